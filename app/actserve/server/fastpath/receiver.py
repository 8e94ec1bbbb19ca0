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

from actserve.core.signature import Array, Arrays
from actserve.engine.arena import Arena
from actserve.engine.batcher import BatchRequest

BUFFER_BYTES = 1 << 16


class Receiver(asyncio.BufferedProtocol, BatchRequest):
    """A connection that has one request at a time, which is received, waits and is acted on; before uvicorn's own
    protocol, `inner`, for all that the lane does not take.

    `_arena` from `_seek` or `_receive` to `_leave`, and `row` or memory of its own once there is a place. `_missing` is
    what has not come yet, `_data` bytes that came and have no place yet: a piece of a head, or what was sent ahead.
    """

    _buffer = memoryview(bytearray(BUFFER_BYTES))  # one for all: filled and emptied in one go, in one thread

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.transport: Any = None  # None: the client has gone
        self.row: int | None = None
        self.size = 1  # observations in the request
        self._arena: Arena | None = None
        self._own: bytearray | None = None
        self._missing: memoryview | None = None
        self._data = b""

    @abstractmethod
    def _begin(self, data: bytes) -> None:
        """`data` begin with a head; nothing is under way."""

    @abstractmethod
    def _complete(self) -> None:
        """The observation is there."""

    # what asyncio calls

    def eof_received(self) -> bool | None:
        ended: bool | None = self._inner.eof_received()
        return ended

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    # to its place

    def _seek(self, arena: Arena) -> None:
        """Receive into a row, at once or when one is free."""
        row = arena.acquire()
        if row is not None:
            self._receive(arena, row)
        else:
            self._arena = arena
            self.transport.pause_reading()
            arena.waiting.append(self)

    def seat(self, row: int) -> bool:
        """What the arena calls: a row has become free."""
        if self.transport is None:
            self._leave()
            return False
        assert self._arena is not None
        self.transport.resume_reading()
        self._receive(self._arena, row)
        return True

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

    # what was sent ahead

    def _keep(self, count: int) -> None:
        """`count` bytes in the buffer are of the next request; too many wait in the socket."""
        self._data += self._buffer[:count]
        if len(self._data) >= BUFFER_BYTES:
            self.transport.pause_reading()

    def _answer_with(self, answer: bytes) -> None:
        """One write; then what was sent ahead has its turn."""
        self.transport.write(answer)
        self._go_on_soon()

    def _go_on_soon(self) -> None:
        if self._data:
            self._inner.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self.transport is None or self._arena is not None or not self._data:
            return
        data, self._data = self._data, b""
        if len(data) >= BUFFER_BYTES:
            self.transport.resume_reading()
        self._begin(data)

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
