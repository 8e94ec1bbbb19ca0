"""Receiver: takes an observation from the socket to where the batch is read from.

A single observation has a row of the arena while it comes quickly. If rows run out, the slowest sender gives up its row
and its observation continues in memory of its own, so a slow client delays no other. The memory of a batch is allocated
before the batch has come, within `Admission.reserve`; beyond that it grows with the bytes that come.
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
from actserve.server.admission import Admission

BUFFER_BYTES = 1 << 16


class Receiver(asyncio.BufferedProtocol, BatchRequest):
    """A connection with one request at a time: received, queued, answered. `inner` is uvicorn's own protocol, which
    gets everything that does not take the fast path.

    `_arena` is set while a request is received or waits for a row, until `_leave`. Its bytes go to `row`, to `_block`
    (memory for all of it), or to `_grown` (as much as has come). `_missing` is where the next bytes go. `_data` holds
    bytes that have no place yet: the beginning of a head, or a request that was sent ahead.
    """

    _buffer = memoryview(bytearray(BUFFER_BYTES))  # one for all connections: filled and emptied in one turn

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.transport: Any = None  # None: the client has disconnected
        self.row: int | None = None
        self.size = 1  # observations in the request
        self._arena: Arena | None = None
        self._admission: Admission | None = None  # that has reserved the block
        self._block: Array | None = None
        self._grown: bytearray | None = None
        self._to_grow = 0  # bytes
        self._missing: memoryview | None = None
        self._data = b""

    @abstractmethod
    def _begin(self, data: bytes) -> None:
        """Handle `data`, which begins with a head, while no request is in progress."""

    @abstractmethod
    def _complete(self) -> None:
        """The whole observation is there."""

    # what asyncio calls

    def eof_received(self) -> bool | None:
        ended: bool | None = self._inner.eof_received()
        return ended

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    # a place for the observation

    def _seek(self, arena: Arena) -> None:
        """Receive into a row, at once or when one is free."""
        row = arena.acquire()
        if row is not None:
            self._receive_row(arena, row)
        else:
            self._arena = arena
            self.transport.pause_reading()
            arena.waiting.append(self)

    def seat(self, row: int) -> bool:
        """Called by the arena when a row has become free; False if it is not needed any more."""
        if self.transport is None:
            self._leave()
            return False
        assert self._arena is not None
        self.transport.resume_reading()
        self._receive_row(self._arena, row)
        return True

    def _receive_row(self, arena: Arena, row: int) -> None:
        self._arena, self.row = arena, row
        self._fill(arena.memory[row])
        if self._missing is not None:
            arena.coming[self] = perf_counter_ns()

    def _receive_batch(self, arena: Arena, admission: Admission) -> None:
        """Receive `self.size` observations."""
        self._arena = arena
        size_bytes = self.size * arena.item_bytes
        if admission.reserve(size_bytes):
            self._admission, self._block = admission, arena.lend(self.size)
            self._fill(self._block.data)
        else:
            came, self._data = self._data[:size_bytes], self._data[size_bytes:]
            self._grow(bytearray(came), size_bytes - len(came))

    def _fill(self, place: memoryview) -> None:
        """Put what has come into `place`, and have the rest received there."""
        if self._data:
            came = self._data[: len(place)]
            self._data = self._data[len(came) :]
            place[: len(came)] = came
            place = place[len(came) :]
        if place:
            self._missing = place
        else:
            self._complete()

    def _grow(self, came: bytearray, to_come: int) -> None:
        """Continue in memory that grows with what comes."""
        self._grown, self._to_grow = came, to_come
        if to_come:
            self._missing = self._buffer[: min(to_come, BUFFER_BYTES)]
        else:
            self._complete()

    def _received(self, count: int) -> None:
        """`count` bytes more have come to `_missing`."""
        assert self._missing is not None
        assert self._arena is not None
        if self._grown is not None:
            self._grown += self._buffer[:count]
            self._to_grow -= count
            if self._to_grow:
                self._missing = self._buffer[: min(self._to_grow, BUFFER_BYTES)]
                return
        elif count < len(self._missing):
            self._missing = self._missing[count:]
            return
        self._missing = None
        self._arena.coming.pop(self, None)
        self._complete()

    def unseat(self) -> int:
        """Called by the arena while the observation is coming: give up the row, and continue elsewhere."""
        assert self._arena is not None
        assert self._missing is not None
        assert self.row is not None
        row, self.row = self.row, None
        memory = self._arena.memory[row]
        to_come = len(self._missing)
        self._grow(bytearray(memory[: len(memory) - to_come]), to_come)
        return row

    def _leave(self) -> None:
        """The request is over, or the client has disconnected: give back its memory."""
        arena, row, block = self._arena, self.row, self._block
        self._arena = self.row = self._block = self._grown = None
        if arena is None:
            return
        if block is not None:
            assert self._admission is not None
            self._admission.release(block.nbytes)
            arena.take_back(block)
        if self._missing is not None:
            self._missing = None
            arena.coming.pop(self, None)
        if row is not None:
            arena.release(row)

    # requests that were sent ahead

    def _keep(self, count: int) -> None:
        """Keep `count` bytes of the next request; a client that sends too much ahead waits."""
        self._data += self._buffer[:count]
        if len(self._data) >= BUFFER_BYTES:
            self.transport.pause_reading()

    def _answer_with(self, answer: bytes) -> None:
        """Write the answer, then handle what was sent ahead."""
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
        """The bytes of all observations, (n,) uint8."""
        assert self._arena is not None
        if self.row is not None:
            row: Array = self._arena.bytes[self.row]
            return row
        if self._block is not None:
            return self._block
        assert self._grown is not None
        return np.frombuffer(self._grown, np.uint8)

    # what the batcher calls

    @property
    def cancelled(self) -> bool:
        return self.transport is None

    def inputs(self) -> Arrays:
        assert self._arena is not None
        return self._arena.inputs_of(self, self.observations)
