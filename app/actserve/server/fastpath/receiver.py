"""Receiver: receives an observation into the memory of a batch.

A single observation is received into a row of the arena. If rows run out, the slowest sender gives up its row, and its
observation continues in separate memory, so a slow client delays no other. The memory of a batch is reserved before its
bytes arrive (`Memory.reserve`); beyond that limit it is counted as they arrive.
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from time import perf_counter_ns
from typing import Any

from actserve.core.signature import Array, Arrays
from actserve.engine.arena import Arena
from actserve.engine.batch import BatchRequest
from actserve.engine.malloc import allocate
from actserve.server.admission import Admission
from actserve.server.memory import Memory

log = logging.getLogger("actserve")

BUFFER_BYTES = 1 << 16


class Receiver(asyncio.BufferedProtocol, BatchRequest):
    """A connection with one request at a time: received, queued, answered. `inner` is uvicorn's own protocol, which
    gets everything that does not take the fast path.

    `_arena` is set while a request is received or waits for a row, until `_leave`. Its bytes go to `row` or to
    `_block`. `_missing` is where the next bytes go. `_tensors` are the observations of a body that had to be decoded.
    `_data` holds bytes without a place: the beginning of a head, or a request that was sent ahead.
    """

    # Shared by all connections: it is filled and emptied in one turn of the event loop.
    _buffer = memoryview(bytearray(BUFFER_BYTES))

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.transport: Any = None  # None: the client has disconnected
        self.row: int | None = None
        self.size = 1  # observations in the request
        self._arena: Arena | None = None
        self._block: Array | None = None
        self._tensors: Arrays | None = None  # each (size, *shape)
        self._admission: Admission | None = None  # the one that reserved the block; None: it is counted as bytes arrive
        self._counted_bytes = 0  # taken from `_memory`
        self._missing: memoryview | None = None
        self._data = b""
        self._waits_for_reader = False

    @abstractmethod
    def _begin(self, data: bytes) -> None:
        """Handle `data`, which begins with a head, while no request is in progress."""

    @abstractmethod
    def _complete(self) -> None:
        """Handle the complete observation."""

    @property
    @abstractmethod
    def _memory(self) -> Memory:
        """What all connections may hold."""

    # called by asyncio

    def eof_received(self) -> bool | None:
        """The client sends no more. True: the connection stays open for the answers to come."""
        return None

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    # a place for the observation

    def _seek(self, arena: Arena) -> None:
        """Receive into a row, now or when one is free."""
        row = arena.acquire()
        if row is not None:
            self._receive_row(arena, row)
        else:
            self._arena = arena
            self.transport.pause_reading()
            arena.waiting.append(self)

    def seat(self, row: int) -> bool:
        """Called by the arena when a row has become free; False if it is no longer needed."""
        if self.transport is None:
            self._leave()
            return False
        assert self._arena is not None
        try:
            self.transport.resume_reading()
            self._receive_row(self._arena, row)
        except Exception:  # the row came from another connection, which goes on
            log.exception("a request could not be received; its connection is closed")
            took = self.row is not None
            self.abandon()
            return took
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
        if admission.memory.reserve(size_bytes):
            self._admission, self._block = admission, arena.lend(self.size)
        else:
            self._take_memory(min(size_bytes, len(self._data)))
            self._block = allocate(size_bytes)
        self._fill(self._block.data)

    def _place(self, tensors: Arrays, arena: Arena) -> None:
        """Take the decoded observations, each (size, *shape). One item is copied into a row, if one is free: a batch of
        rows is not concatenated.
        """
        self._arena, self._tensors = arena, tensors
        self.row = arena.place(tensors) if self.size == 1 else None

    def _receive_body(self, body_bytes: int, arena: Arena | None) -> None:
        """Receive a body of any form. Its memory is counted as it arrives."""
        self._arena = arena
        self._take_memory(min(body_bytes, len(self._data)))
        self._block = allocate(body_bytes)
        self._fill(self._block.data)

    def _fill(self, place: memoryview) -> None:
        """Move the received bytes to `place`, and receive the rest there."""
        if self._data:
            received = self._data[: len(place)]
            self._data = self._data[len(received) :]
            place[: len(received)] = received
            place = place[len(received) :]
        if place:
            self._missing = place
        else:
            self._complete()

    def _received(self, count: int) -> None:
        """Handle `count` more bytes in `_missing`."""
        assert self._missing is not None
        if self._block is not None and self._admission is None:
            self._take_memory(count)
        if count < len(self._missing):
            self._missing = self._missing[count:]
            return
        self._missing = None
        if self._arena is not None:
            self._arena.coming.pop(self, None)
        self._complete()

    def _take_memory(self, size_bytes: int) -> None:
        """Raises `MemoryFull`."""
        self._memory.take(size_bytes)
        self._counted_bytes += size_bytes

    def unseat(self) -> int:
        """Called by the arena while the observation arrives: give up the row, and continue in other memory."""
        assert self._arena is not None
        assert self._missing is not None
        assert self.row is not None
        observation = self._arena.bytes[self.row]
        received = len(observation) - len(self._missing)
        block = allocate(len(observation))
        block[:received] = observation[:received]
        self._memory.take_in_any_case(received)
        self._counted_bytes += received
        self._block, self._missing = block, block.data[received:]
        row, self.row = self.row, None
        return row

    def _leave(self) -> None:
        """Free the memory of the request, when it is answered or the client has disconnected."""
        arena, row, block, admission = self._arena, self.row, self._block, self._admission
        self._arena = self.row = self._block = self._tensors = self._admission = self.recorder = None
        if self._counted_bytes:
            self._memory.give_back(self._counted_bytes)
            self._counted_bytes = 0
        was_coming, self._missing = self._missing is not None, None
        if arena is None:
            return
        if block is not None and admission is not None:
            admission.memory.release(block.nbytes)
            arena.take_back(block)
        if was_coming:
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
        """Write the answer, then handle the request that was sent ahead, if any."""
        self.transport.write(answer)
        self._go_on_soon()

    def _go_on_soon(self) -> None:
        if self._data:
            self._inner.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self.transport is None or self._in_progress or not self._data or self._waits_for_reader:
            return
        data, self._data = self._data, b""
        if len(data) >= BUFFER_BYTES:
            self.transport.resume_reading()
        try:
            self._begin(data)
        except Exception:  # as in `buffer_updated`
            self.abandon()
            raise
        if len(self._data) >= BUFFER_BYTES and self.transport is not None:  # still too much
            self.transport.pause_reading()

    @property
    def observations(self) -> Array:
        """The bytes of a body that was received in place, (n,) uint8."""
        if self._arena is not None and self.row is not None:
            row: Array = self._arena.bytes[self.row]
            return row
        assert self._block is not None
        return self._block

    @property
    def _in_progress(self) -> bool:
        """Whether there is a request that is not answered."""
        return self._arena is not None

    @property
    def waits_for_row(self) -> bool:
        return self._arena is not None and self.row is None and self._block is None

    @property
    def held_bytes(self) -> int:
        """The memory of requests that were sent ahead, and of answers that the client does not read."""
        held: int = len(self._data) + self.transport.get_write_buffer_size()
        return held

    # called by the batcher

    @property
    def cancelled(self) -> bool:
        return self.transport is None

    def inputs(self) -> Arrays:
        assert self._arena is not None
        if self.row is not None:
            return self._arena.inputs([self])
        return self._arena.inputs_of(self, self.observations if self._tensors is None else self._tensors)

    def abandon(self) -> None:
        try:
            self._leave()
        except Exception:
            log.exception("the memory of a request could not be freed")
        if self.transport is not None:
            self.transport.abort()
