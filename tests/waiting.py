"""Waiting for what happens elsewhere, with a bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

WITHIN_S = 120.0  # a bound for what never happens, and no measure of speed


def until(condition: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        time.sleep(0.005)


async def until_in_loop(condition: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    """The same in an event loop, which goes on meanwhile. Raises `TimeoutError`."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
