"""Waiting for what happens elsewhere, with a bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "this should have happened by now"
        time.sleep(0.005)


async def until_in_loop(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    """The same in an event loop, which goes on meanwhile. Raises `TimeoutError`."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
