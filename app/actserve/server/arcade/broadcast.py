"""GameBroadcast: plays one game over a WebSocket. It sends a hello and pictures, and receives commands."""

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

PICTURE_S = 1 / 60  # between two pictures: the refresh rate of a usual screen
FPS = 60  # of the console: the normal speed of a game
REMEMBERED = 256  # steps in one message; a slow browser misses older ones
_OVER, _IDLE = 1000, 1001


class Command(BaseModel):
    """A message of the page. Each message sets all fields."""

    model_config = ConfigDict(extra="forbid")

    held: int | None = Field(None, ge=0)  # the action to take instead of the policy's
    speed: float = Field(1, ge=0, le=16)  # a multiple of the normal speed; 0: unlimited
    paused: bool = False


class GameBroadcast:
    """One game on one WebSocket. Playing, sending and receiving run as concurrent tasks."""

    def __init__(self, websocket: WebSocket, game: Game, idle_s: float) -> None:
        self._websocket = websocket
        self._game = game
        self._idle_s = idle_s  # the longest pause
        self._command = Command()
        self._command_came = asyncio.Event()
        self._steps: deque[GameStep] = deque(maxlen=REMEMBERED)  # not sent yet
        self._stepped = asyncio.Event()

    async def run(self) -> int:
        """Play the whole game; returns the close code.

        Raises `WebSocketDisconnect`, `InvalidRequest` for an invalid command, and as the policy.
        """
        await self._websocket.send_text(self._hello())
        tasks = {asyncio.create_task(task) for task in (self._receive_commands(), self._play(), self._send_pictures())}
        running = tasks
        try:
            while True:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (code := task.result()) is not None:
                        return code
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _play(self) -> int | None:
        """Play at the chosen speed. If a step is late, the next ones do not hurry to catch up."""
        clock = asyncio.get_running_loop().time
        due = clock()
        while not self._game.over:
            if self._command.paused:
                self._command_came.clear()
                try:
                    await asyncio.wait_for(self._command_came.wait(), self._idle_s)
                except TimeoutError:
                    return _IDLE
                continue
            self._steps.append(await self._game.step(self._command.held))
            self._stepped.set()
            step_s = self._game.environment.frame_skip / FPS
            due = max(clock(), due + step_s / self._command.speed if self._command.speed else 0)
            await asyncio.sleep(due - clock())
        return None  # the last picture must still be sent

    async def _send_pictures(self) -> int:
        """Send the latest step, at most once every `PICTURE_S`, and as fast as the browser receives."""
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

    async def _receive_commands(self) -> int:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                if message["code"] == RESTART:
                    return RESTART
                raise WebSocketDisconnect(message["code"])
            self._command = self._parse(message.get("text") or "")
            self._command_came.set()

    def _parse(self, text: str) -> Command:
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
        last, statistics = steps[-1], self._game.policy.statistics()
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
            "items": statistics.items,  # answered by the policy so far, for all clients
            "batches": statistics.batches,  # runtime calls for these items
        }
