"""LoopLag: how long the turns of the event loop are. A long turn delays every request of its process."""

from __future__ import annotations

import asyncio
from collections import deque
from time import perf_counter_ns
from typing import Self

from actserve.telemetry.meters import TIMES_NS, Histogram

EVERY_S = 0.05
WINDOW_S = 60


class LoopLag:
    """Measures how much too late a timer runs, every `EVERY_S`. An asynchronous context manager.

    `lag_ns` are all measurements. `longest_ns` is the longest one in the last `WINDOW_S` to twice as long.
    """

    def __init__(self) -> None:
        self.lag_ns = Histogram(TIMES_NS)
        self._longest: deque[int] = deque([0], maxlen=2)  # of two windows

    @property
    def longest_ns(self) -> int:
        return max(self._longest)

    async def __aenter__(self) -> Self:
        self._measuring = asyncio.create_task(self._measure())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._measuring.cancel()

    async def _measure(self) -> None:
        while True:
            for _ in range(int(WINDOW_S / EVERY_S)):
                due_ns = perf_counter_ns() + int(EVERY_S * 1e9)
                await asyncio.sleep(EVERY_S)
                lag_ns = max(0, perf_counter_ns() - due_ns)
                self.lag_ns.add(lag_ns)
                self._longest[-1] = max(self._longest[-1], lag_ns)
            self._longest.append(0)
