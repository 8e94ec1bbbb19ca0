"""`actserve.server.arcade.broadcast` with a browser that takes its time."""

from __future__ import annotations

import asyncio
import json
import struct
from dataclasses import replace
from typing import Any, cast

from fastapi import WebSocket

from actserve.engine.policy import Policy
from actserve.server.arcade.broadcast import REMEMBERED, GameBroadcast
from actserve.server.arcade.game import Game
from tests.test_atari import PONG
from tests.test_game import counting

STEPS = 400


class SlowBrowser:
    """Takes the hello and the first picture, and from then on nothing until `gate` is set."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.heads: list[dict[str, Any]] = []

    async def send_text(self, _text: str) -> None:
        pass

    async def send_bytes(self, message: bytes) -> None:
        (size,) = struct.unpack_from("<I", message)
        self.heads.append(json.loads(message[4 : 4 + size]))
        if len(self.heads) > 1:
            await self.gate.wait()

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0 if not self.heads else 60)
        return {"type": "websocket.receive", "text": '{"speed": 0}'}


def test_a_slow_browser_misses_pictures_and_holds_nothing_up() -> None:
    policy = counting(replace(PONG, max_frames=4 * STEPS))

    async def play() -> SlowBrowser:
        async def find() -> Policy:
            return policy

        policy.start()
        browser, game = SlowBrowser(), Game(find, None, 1)
        await game.begin()
        try:
            showing = asyncio.create_task(GameBroadcast(cast(WebSocket, browser), game, 60).run())
            async with asyncio.timeout(60):
                while not game.over:  # although nothing is taken
                    await asyncio.sleep(0.01)
            assert len(browser.heads) == 2
            browser.gate.set()
            assert await showing == 1000
        finally:
            game.close()
            await policy.close()
        return browser

    first, second, last = asyncio.run(play()).heads
    assert first["step"] < second["step"] < last["step"] <= STEPS
    assert last["over"]
    assert len(last["run_us"]) == REMEMBERED < last["step"] - second["step"]
    assert last["proposed"] == (3 + last["step"] - 1) % 6
