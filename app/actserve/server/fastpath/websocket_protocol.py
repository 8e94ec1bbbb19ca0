"""One WebSocket connection whose route offers an episode: the fast path takes the steps.

It wraps the WebSocket protocol as `FastPathProtocol` wraps the HTTP protocol. It reads the headers of frames. While the
route waits for a message, it offers its episode. A whole binary message is then received, into a row of the arena or
into other memory that the episode reads, and the reply is one write.

Everything else goes unchanged to the WebSocket protocol, which passes it to the route: control frames, text, fragmented
messages, and messages that the episode declines. A message for the route ends the offer.
"""

from __future__ import annotations

import asyncio
import sys
from time import perf_counter_ns
from typing import Any

import numpy as np

from actserve.core.errors import ActserveError, MemoryFull
from actserve.core.signature import Array, Arrays
from actserve.engine.batch import BatchResult
from actserve.engine.recorders import committed
from actserve.server.admission import Ticket
from actserve.server.fastpath import websocket_frames as frames
from actserve.server.fastpath.receiver import Receiver
from actserve.server.http.episode_socket import Message, SteppableEpisode
from actserve.server.http.websocket import WebSocketProtocol
from actserve.server.memory import Memory

try:
    from websockets.speedups import apply_mask
except ImportError:  # websockets was installed without its compiled part
    from websockets.utils import apply_mask


class FastPathSocket(Receiver):
    """A connection is also its step in progress."""

    def __init__(self, inner: WebSocketProtocol, transport: Any) -> None:
        super().__init__(inner)
        self.transport = transport
        self._offered: SteppableEpisode | None = None
        self._episode: SteppableEpisode | None = None  # of the step in progress
        self._ticket = Ticket()  # of the step in progress
        self._own_inputs: Arrays | None = None  # of the step in progress, without an arena
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
        if self._episode is None and self._offered is not None and self._offered.in_place and not self._data:
            arena = self._offered.state.arena
            assert arena is not None
            return self._buffer[: frames.masked_size(arena.item_bytes)]
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
        return self._episode.state.admission.memory

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
            or not episode.takes(header.length)
            or not self._inner.writable.is_set()
        ):
            return False
        state = episode.state
        if header.length > state.admission.memory.free_bytes:
            return False
        ticket = state.new_ticket()
        try:
            state.admission.admit(state.batcher, 1, ticket, episode.patience_ns)
        except ActserveError:  # the route answers, and closes the connection if need be
            state.leave(ticket)
            return False
        self._episode, self._ticket, self._mask = episode, ticket, header.mask
        self.slot, self.begins, self.patience_ns = state.slot, state.steps == 0, episode.patience_ns
        self.recorder = state.step_recorder()
        self._idle.clear()
        self._data = data[header.size :]
        if episode.in_place:
            assert state.arena is not None
            self._seek(state.arena)
        elif len(self._data) >= header.length:  # small messages come whole
            message, self._data = self._data[: header.length], self._data[header.length :]
            self._arena, self._block = state.arena, unmasked(message, header.mask)
            self._step(self._block)
        else:
            self._receive_body(header.length, state.arena)
        return True

    def _complete(self) -> None:
        message = self.observations
        unmask(message, self._mask)
        self._step(message)

    def _step(self, message: Array) -> None:
        """Queue the step of a whole message."""
        episode = self._episode
        assert episode is not None
        state = episode.state
        try:
            if not episode.in_place:
                tensors = episode.read(message)
                if tensors is None:
                    self._leave_to_route(message)
                    return
                if state.arena is not None:
                    self._place(tensors, state.arena)
                else:
                    self._own_inputs = state.inputs(tensors)
            self.since_ns = perf_counter_ns()
            state.admission.enter(state.batcher, self)
        except ActserveError:  # the route answers, and closes the connection if need be
            self._leave_to_route(message)

    def _leave_to_route(self, message: Array) -> None:
        assert self._episode is not None
        self._offered = None
        self._episode.state.leave(self._ticket)
        self._inner.receive_binary(message.tobytes())
        self._leave()
        self._go_on_soon()

    @property
    def _in_progress(self) -> bool:
        return self._episode is not None

    # called by the batcher

    def inputs(self) -> Arrays:
        return super().inputs() if self._own_inputs is None else self._own_inputs

    def settle(self, outcome: BatchResult, start: int) -> None:
        episode = self._episode
        assert episode is not None
        if self.transport is None:
            self._leave()
        elif outcome.error is not None:
            episode.state.refused(outcome.error)
            self._send(episode.refusal(outcome.error))
        else:
            committed(self.recorder)
            self._send(episode.reply(episode.state.stepped(outcome, start, outcome.begun_ns - self.since_ns)))

    def _send(self, message: Message) -> None:
        self._leave()
        self._answer_with(frames.write(message))

    def _leave(self) -> None:
        super()._leave()
        self._episode = self._own_inputs = None
        self._idle.set()


def unmasked(payload: bytes, mask: bytes) -> Array:
    """A copy of `payload`, (n,) uint8, unmasked."""
    return np.frombuffer(bytearray(apply_mask(payload, mask)), np.uint8)


def unmask(payload: Array, mask: bytes) -> None:
    """Unmask `payload`, (n,) uint8, in place (RFC 6455, section 5.3)."""
    mask *= 2
    whole = len(payload) // 8 * 8
    words = payload[:whole].view(np.uint64)
    np.bitwise_xor(words, np.uint64(int.from_bytes(mask, sys.byteorder)), out=words)
    if whole < len(payload):
        payload[whole:] ^= np.frombuffer(mask, np.uint8)[: len(payload) - whole]
