"""What goes over the WebSocket of one game: a hello, pictures of its steps, and the page's commands."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from typing import Any

import pydantic_core
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actserve.core.errors import InvalidRequest
from actserve.server.arcade.game import Game, GameStep
from actserve.server.http.websocket import RESTART

PICTURE_S = 1 / 60  # no screen shows more
FPS = 60  # of the console, and so of a game at its own speed
REMEMBERED = 256  # steps that one message tells of: a browser that takes its time misses the ones before
_OVER, _IDLE = 1000, 1001


class Command(BaseModel):
    """What the page says: all of it, each time."""

    model_config = ConfigDict(extra="forbid")

    held: int | None = Field(None, ge=0)  # the action to take instead of the policy's
    speed: float = Field(1, ge=0, le=16)  # times the game's own; 0: as fast as it goes
    paused: bool = False


class GameBroadcast:
    """One game on one WebSocket. Playing, showing and listening go on side by side, and none waits for another."""

    def __init__(self, websocket: WebSocket, game: Game, idle_s: float) -> None:
        self._websocket = websocket
        self._game = game
        self._idle_s = idle_s  # the longest pause
        self._command = Command()
        self._told = asyncio.Event()  # a command has come
        self._steps: deque[GameStep] = deque(maxlen=REMEMBERED)  # not shown yet
        self._stepped = asyncio.Event()

    async def run(self) -> int:
        """From the hello to the end; the code to close with. Raises `WebSocketDisconnect`, `InvalidRequest` for a
        command that is none, or what the policy raises."""
        await self._websocket.send_text(self._hello())
        parts = {asyncio.create_task(part) for part in (self._listen(), self._play(), self._show())}
        running = parts
        try:
            while True:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for part in done:
                    if (code := part.result()) is not None:
                        return code
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _play(self) -> int | None:
        """GameStep after step, in the game's own time; what cannot be kept up with is not made up for."""
        clock = asyncio.get_running_loop().time
        due = clock()
        while not self._game.over:
            if self._command.paused:
                self._told.clear()
                try:
                    await asyncio.wait_for(self._told.wait(), self._idle_s)
                except TimeoutError:
                    return _IDLE
                continue
            self._steps.append(await self._game.step(self._command.held))
            self._stepped.set()
            own_s = self._game.environment.frame_skip / FPS
            due = max(clock(), due + own_s / self._command.speed if self._command.speed else 0)
            await asyncio.sleep(due - clock())
        return None  # the last picture has yet to be shown

    async def _show(self) -> int:
        """The latest step, as often as a screen can show it and the browser takes it."""
        while True:
            await self._stepped.wait()
            self._stepped.clear()
            steps = list(self._steps)
            self._steps.clear()
            head = pydantic_core.to_json(self._head(steps))
            picture = await self._game.png(steps[-1])
            await self._websocket.send_bytes(struct.pack("<I", len(head)) + head + picture)
            if steps[-1].over:
                return _OVER
            await asyncio.sleep(PICTURE_S)

    async def _listen(self) -> int:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                if message["code"] == RESTART:
                    return RESTART
                raise WebSocketDisconnect(message["code"])
            self._command = self._read(message.get("text") or "")
            self._told.set()

    def _read(self, text: str) -> Command:
        actions = len(self._game.environment.actions)
        try:
            command = Command.model_validate_json(text)
        except ValidationError as error:
            raise InvalidRequest(
                f"expected a command, such as {Command().model_dump_json()}; got {text[:80]!r}"
            ) from error
        if command.held is not None and command.held >= actions:
            raise InvalidRequest(f"expected an action to hold from 0 to {actions - 1}; got {command.held}")
        return command

    def _hello(self) -> str:
        game, policy = self._game, self._game.policy
        hello = {
            "policy": policy.name,
            "version": policy.version,
            "runtime": policy.choice.runtime,
            "exploration": game.exploration,
            "seed": game.seed,
            "environment": game.environment,
            "values": game.values,
        }
        return pydantic_core.to_json(hello).decode()

    def _head(self, steps: list[GameStep]) -> dict[str, Any]:
        last, counted = steps[-1], self._game.policy.statistics()
        return {
            "step": last.number,
            "score": last.score,
            "rewards": [step.reward for step in steps if step.reward],
            "proposed": last.proposed,
            "taken": last.taken,
            "values": last.values,
            "over": last.over,
            "queue_us": [step.queue_ns // 1000 for step in steps],
            "run_us": [step.run_ns // 1000 for step in steps],
            "items": counted.items,  # that the policy has answered so far, whoever asked
            "batches": counted.batches,  # in so many runtime calls
        }
