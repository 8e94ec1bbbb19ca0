"""What the connections of the lane have in common: an observation goes from the socket to where the batch is read from.

It has a row of the arena for as long as it comes quickly. If rows run out, the one that has been coming longest gives
its row up and comes to memory of its own: whoever sends slowly keeps nobody else waiting.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from time import perf_counter_ns
from typing import Any

import numpy as np

from app.arena import Arena
from app.batcher import Waiting
from app.signature import Array, Arrays


class Receiver(asyncio.BufferedProtocol, Waiting):
    """A connection that has one request at a time, which is received, waits and is acted on.

    `_arena`, and `row` or memory of its own, from `_receive` to `_leave`. `_missing` is what has not come yet, `_data`
    bytes that came and have no place yet.
    """

    def __init__(self) -> None:
        self.transport: Any = None  # None: the client has gone
        self.row: int | None = None
        self.size = 1  # observations in the request
        self._arena: Arena | None = None
        self._own: bytearray | None = None
        self._missing: memoryview | None = None
        self._data = b""

    @abstractmethod
    def _complete(self) -> None:
        """The observation is there."""

    def _receive(self, arena: Arena, row: int | None) -> None:
        """Put what has come into its place, and the rest behind it as it comes."""
        missing = self._place(arena, row)
        if self._data:
            came = self._data[: len(missing)]
            self._data = self._data[len(came) :]
            missing[: len(came)] = came
            missing = missing[len(came) :]
        if missing:
            self._missing = missing
            if row is not None:
                arena.coming[self] = perf_counter_ns()
        else:
            self._complete()

    def _place(self, arena: Arena, row: int | None) -> memoryview:
        """Where the observations belong: `row` or, if there is none, memory of their own."""
        self._arena, self.row = arena, row
        if row is not None:
            return arena.memory[row]
        self._own = arena.lend(self.size)
        return memoryview(self._own)

    def _received(self, count: int) -> None:
        """`count` bytes more are in their place."""
        assert self._missing is not None
        assert self._arena is not None
        if count < len(self._missing):
            self._missing = self._missing[count:]
            return
        self._missing = None
        self._arena.coming.pop(self, None)
        self._complete()

    def unseat(self) -> int:
        """What the arena calls while the observation is coming: the row is needed."""
        assert self._arena is not None
        assert self._missing is not None
        assert self.row is not None
        row, self.row = self.row, None
        here = self._arena.memory[row]
        self._own = self._arena.lend(1)
        self._own[:] = here
        self._missing = memoryview(self._own)[len(here) - len(self._missing) :]
        return row

    def _leave(self) -> None:
        """The observation is done with, or will never be there: give its place back."""
        arena, row, own = self._arena, self.row, self._own
        self._arena = self.row = self._own = None
        if arena is None:
            return
        if own is not None:
            arena.take_back(own)
        if self._missing is not None:
            self._missing = None
            arena.coming.pop(self, None)
        if row is not None:
            arena.release(row)

    @property
    def observations(self) -> Array:
        """Their bytes, (n,) uint8."""
        assert self._arena is not None
        if self.row is not None:
            row: Array = self._arena.bytes[self.row]
            return row
        assert self._own is not None
        return np.frombuffer(self._own, np.uint8)

    # what the batcher calls

    @property
    def cancelled(self) -> bool:
        return self.transport is None

    def inputs(self) -> Arrays:
        assert self._arena is not None
        return self._arena.inputs_of(self, self.observations)
