"""GameBroadcast: plays one game over a WebSocket. It sends a hello and pictures, and receives commands.

Usually the policy acts on the service, and a slow browser misses pictures. A browser that has the policy itself may act
instead: then it gets the picture of every step, and the game waits for its action.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import pydantic_core
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actserve.core.errors import InvalidRequest
from actserve.server.arcade.game import Game, GameStep, Proposal
from actserve.server.http.websocket import RESTART

PICTURE_S = 1 / 60  # between two pictures: the refresh rate of a usual screen
FPS = 60  # of the console: the normal speed of a game
REMEMBERED = 256  # steps in one message; a slow browser misses older ones
_OVER, _IDLE = 1000, 1001


class Command(BaseModel):
    """A message of the page. Each message sets all fields."""

    model_config = ConfigDict(extra="forbid")

    held: int | None = Field(None, ge=0)  # the action to take instead of the policy's
    step: int = Field(0, ge=0)  # where the browser acts: `held` is its action at this step
    speed: float = Field(1, ge=0, le=16)  # a multiple of the normal speed; 0: unlimited
    paused: bool = False


class GameBroadcast:
    """One game on one WebSocket. Playing, sending and receiving run as concurrent tasks."""

    def __init__(self, websocket: WebSocket, game: Game, idle_s: float, browser_acts: bool = False) -> None:
        self._websocket = websocket
        self._game = game
        self._browser_acts = browser_acts
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
        playing = [self._play_with_browser()] if self._browser_acts else [self._play(), self._send_pictures()]
        tasks: set[asyncio.Task[int | None]] = {
            asyncio.create_task(task) for task in (self._receive_commands(), *playing)
        }
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
        """Play at the chosen speed."""
        pace = self._pace()
        while not self._game.over:
            if self._command.paused:
                if not await self._next_command():
                    return _IDLE
                continue
            self._steps.append(await self._game.step(self._command.held))
            self._stepped.set()
            await anext(pace)
        return None  # the last picture must still be sent

    async def _play_with_browser(self) -> int:
        """Send the picture of each step, and take the action that the browser sends for it."""
        pace = self._pace()
        last: GameStep | None = None
        while not self._game.over:
            proposal = await self._game.propose()
            await self._send_picture(proposal, None, [last] if last else [])
            while self._command.paused or self._command.held is None or self._command.step != proposal.number:
                if not await self._next_command():
                    return _IDLE
            last = await self._game.take(proposal, self._command.held)
            await anext(pace)
        assert last is not None
        await self._send_picture(last.proposal, last.taken, [last])
        return _OVER

    async def _pace(self) -> AsyncIterator[None]:
        """Ends each step at the chosen speed. If a step is late, the next ones do not hurry to catch up."""
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            step_s = self._game.environment.frame_skip / FPS
            due = max(clock(), due + step_s / self._command.speed if self._command.speed else 0)
            await asyncio.sleep(due - clock())
            yield

    async def _next_command(self) -> bool:
        """Wait for a command; false if none came for too long."""
        self._command_came.clear()
        try:
            await asyncio.wait_for(self._command_came.wait(), self._idle_s)
        except TimeoutError:
            return False
        return True

    async def _send_pictures(self) -> int:
        """Send the latest step, at most once every `PICTURE_S`, and as fast as the browser receives."""
        while True:
            await self._stepped.wait()
            self._stepped.clear()
            steps = list(self._steps)
            self._steps.clear()
            last = steps[-1]
            await self._send_picture(last.proposal, last.taken, steps)
            if last.over:
                return _OVER
            await asyncio.sleep(PICTURE_S)

    async def _send_picture(self, proposal: Proposal, taken: int | None, steps: list[GameStep]) -> None:
        """Send a step that was taken, or whose action is awaited, with the `steps` taken since the last picture."""
        head = pydantic_core.to_json(self._head(proposal, taken, steps))
        picture = await self._game.png(proposal)
        await self._websocket.send_bytes(struct.pack("<I", len(head)) + head + picture)

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

    def _head(self, proposal: Proposal, taken: int | None, steps: list[GameStep]) -> dict[str, Any]:
        statistics = self._game.policy.statistics()
        return {
            "step": proposal.number,
            "score": steps[-1].score if steps else 0.0,
            "rewards": [step.reward for step in steps if step.reward],
            "proposed": proposal.action,
            "taken": taken,  # null: the browser's action is awaited
            "values": proposal.values,
            "over": self._game.over,
            "queue_us": [step.proposal.queue_ns // 1000 for step in steps],
            "run_us": [step.proposal.run_ns // 1000 for step in steps],
            "items": statistics.items,  # answered by the policy so far, for all clients
            "batches": statistics.batches,  # runtime calls for these items
        }
