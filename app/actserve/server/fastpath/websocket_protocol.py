"""One WebSocket connection: binary messages of one observation are received into a row of the arena.

It wraps the WebSocket protocol as `FastPathProtocol` wraps the HTTP protocol. It reads the headers of frames. Control
frames, text and fragmented messages go unchanged to the WebSocket protocol, which passes them to the route in
`actserve.server.http.stream`. While the route waits for a message, it offers its episode, and the fast path may step
the episode. A message for the route ends the offer.
"""

from __future__ import annotations

import asyncio
import sys
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np

from actserve.core.errors import ActserveError, MemoryFull
from actserve.core.signature import Array
from actserve.engine.arena import Arena
from actserve.engine.batch import BatchResult
from actserve.engine.batcher import Batcher
from actserve.engine.recorders import StepRecorder, committed
from actserve.server.admission import Admission, Ticket
from actserve.server.fastpath import websocket_frames as frames
from actserve.server.fastpath.receiver import Receiver
from actserve.server.http.websocket import WebSocketProtocol
from actserve.server.memory import Memory


class SteppableEpisode(Protocol):
    """The interface of an episode that the route offers."""

    batcher: Batcher
    arena: Arena
    admission: Admission
    slot: int | None
    steps: int
    ticket: Ticket | None  # of a message that was charged and left to the route

    def new_ticket(self) -> Ticket:
        """A ticket for the next message."""

    def step_recorder(self) -> StepRecorder | None:
        """The recorder of the next step."""

    def reply(self, outcome: BatchResult, start: int, queue_ns: int) -> bytes:
        """The payload of the reply to a step."""

    def refusal(self, error: ActserveError) -> bytes:
        """The text payload of the reply to a refused step."""


class FastPathStream(Receiver):
    """A connection is also its step in progress."""

    def __init__(self, inner: WebSocketProtocol, transport: Any) -> None:
        super().__init__(inner)
        self.transport = transport
        self._offered: SteppableEpisode | None = None
        self._episode: SteppableEpisode | None = None  # of the step in progress
        self._mask = b""
        self._passing = 0  # remaining bytes of a frame for the inner protocol
        self._idle = asyncio.Event()
        self._idle.set()

    # called by the route

    def offer(self, episode: SteppableEpisode) -> None:
        if self._inner.queue.empty():
            self._offered = episode

    async def withdraw(self) -> None:
        """End the offer; returns when no step is in progress."""
        self._offered = None
        await self._idle.wait()

    # called by asyncio

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._missing is not None:
            return self._missing
        if self._passing:
            return self._buffer[: self._passing]
        if self._episode is None and self._offered is not None and not self._data:
            return self._buffer[: frames.masked_size(self._offered.arena.item_bytes)]
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        try:
            if self._missing is not None:
                self._received(count)
            elif self._passing:
                self._passing -= count
                self._inner.data_received(bytes(self._buffer[:count]))
            elif self._episode is not None:
                self._keep(count)
            else:
                self._begin(self._data + self._buffer[:count])
        except MemoryFull:
            self.abandon()
        except Exception:  # the request is not queued: the last thing that it does is to enter the queue
            self.abandon()
            raise  # for the log of the event loop

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self._missing is not None:
            self._leave()
        self._inner.connection_lost(error)

    @property
    def _memory(self) -> Memory:
        assert self._episode is not None
        return self._episode.admission.memory

    # frames arrive

    def _begin(self, data: bytes) -> None:
        self._data = b""
        while data:
            header = frames.read(data)
            if header is None:
                self._data = data
                return
            if self._take(header, data):
                return
            if header.is_data:
                self._offered = None
            end = header.size + header.length
            self._passing = max(0, end - len(data))
            self._inner.data_received(data[:end])
            data = data[end:]

    def _take(self, header: frames.FrameHeader, data: bytes) -> bool:
        """Start to receive the message at the start of `data`, if it takes the fast path; returns whether it does."""
        episode = self._offered
        if (
            episode is None
            or header.first != frames.BINARY
            or not header.mask
            or header.length != episode.arena.item_bytes
            or not self._inner.writable.is_set()
        ):
            return False
        ticket = episode.new_ticket()
        try:
            episode.admission.admit(episode.batcher, 1, ticket)
        except ActserveError:  # the route answers, and closes the stream if need be
            episode.ticket = ticket
            return False
        self._episode, self._mask = episode, header.mask
        self.slot, self.begins = episode.slot, episode.steps == 0
        self.recorder = episode.step_recorder()
        self._idle.clear()
        self._data = data[header.size :]
        self._seek(episode.arena)
        return True

    def _complete(self) -> None:
        assert self._episode is not None
        observation = self.observations
        unmask(observation, self._mask)
        self.since_ns = perf_counter_ns()
        try:
            self._episode.admission.enter(self._episode.batcher, self)
        except ActserveError:  # the route answers, and closes the stream if need be
            self._offered = None
            self._inner.queue.put_nowait({"type": "websocket.receive", "bytes": observation.tobytes()})
            self._leave()
            self._go_on_soon()

    # called by the batcher

    def settle(self, outcome: BatchResult, start: int) -> None:
        assert self._episode is not None
        if self.transport is None:
            self._leave()
        elif outcome.error is not None:
            self._send(frames.TEXT, self._episode.refusal(outcome.error))
        else:
            committed(self.recorder)
            self._send(frames.BINARY, self._episode.reply(outcome, start, outcome.begun_ns - self.since_ns))

    def _send(self, first: int, payload: bytes) -> None:
        self._leave()
        self._answer_with(frames.write(first, payload))

    def _leave(self) -> None:
        super()._leave()
        self._episode = None
        self._idle.set()


def unmask(payload: Array, mask: bytes) -> None:
    """Unmask `payload`, (n,) uint8, in place (RFC 6455, section 5.3)."""
    mask *= 2
    whole = len(payload) // 8 * 8
    words = payload[:whole].view(np.uint64)
    np.bitwise_xor(words, np.uint64(int.from_bytes(mask, sys.byteorder)), out=words)
    if whole < len(payload):
        payload[whole:] ^= np.frombuffer(mask, np.uint8)[: len(payload) - whole]
