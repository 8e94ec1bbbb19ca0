"""The fast lane of a stream: whole binary messages of one observation, from the socket into a row of the arena.

It stands before the WebSocket's protocol as `LaneProtocol` stands before HTTP's. It follows the frames by their heads
alone; what it does not take, control frames, text, messages in pieces, goes to that protocol byte for byte, and so to
the route in `actserve.server.http.stream`. Whenever the route waits for a message and none is on its way, it offers its
episode, and the lane may step it; a message that the route is to answer ends the offer.
"""

from __future__ import annotations

import asyncio
import sys
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np

from actserve.core.errors import ActserveError
from actserve.core.signature import Array
from actserve.engine.arena import Arena
from actserve.engine.batcher import Batcher, BatchResult
from actserve.server.access.tokens import Token
from actserve.server.fastpath import websocket_frames as frames
from actserve.server.fastpath.receiver import Receiver
from actserve.server.http.websocket import WebSocketProtocol


class SteppableEpisode(Protocol):
    """What the route offers."""

    batcher: Batcher
    arena: Arena
    slot: int | None
    steps: int
    token: Token | None

    def reply(self, outcome: BatchResult, start: int, queue_ns: int) -> bytes:
        """The step is done: the reply's payload."""

    def refusal(self, error: ActserveError) -> bytes:
        """The step was not taken: the payload, text, that says why."""


class FastPathStream(Receiver):
    """A connection is also the step that it has under way."""

    def __init__(self, inner: WebSocketProtocol, transport: Any) -> None:
        super().__init__(inner)
        self.transport = transport
        self._offered: SteppableEpisode | None = None
        self._episode: SteppableEpisode | None = None  # whose step is received or run
        self._mask = b""
        self._passing = 0  # bytes of a frame that are still to go to the inner protocol
        self._idle = asyncio.Event()
        self._idle.set()

    # what the route calls

    def offer(self, episode: SteppableEpisode) -> None:
        if self._inner.queue.empty():
            self._offered = episode

    async def withdraw(self) -> None:
        """Returns when nothing is under way any more."""
        self._offered = None
        await self._idle.wait()

    # what asyncio calls

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._missing is not None:
            return self._missing
        if self._passing:
            return self._buffer[: self._passing]
        if self._episode is None and self._offered is not None and not self._data:
            return self._buffer[: frames.masked_size(self._offered.arena.item_bytes)]
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        if self._missing is not None:
            self._received(count)
        elif self._passing:
            self._passing -= count
            self._inner.data_received(bytes(self._buffer[:count]))
        elif self._episode is not None:
            self._keep(count)
        else:
            self._begin(self._data + self._buffer[:count])

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self._missing is not None:
            self._leave()
        self._inner.connection_lost(error)

    # frames come

    def _begin(self, data: bytes) -> None:
        self._data = b""
        while data:
            head = frames.read(data)
            if head is None:
                self._data = data
                return
            if self._take(head, data):
                return
            if head.is_of_a_message:
                self._offered = None
            end = head.size + head.length
            self._passing = max(0, end - len(data))
            self._inner.data_received(data[:end])
            data = data[end:]

    def _take(self, head: frames.FrameHeader, data: bytes) -> bool:
        """Whether the lane steps this message, which `data` begin with; then it is being received."""
        episode = self._offered
        if (
            episode is None
            or head.first != frames.BINARY
            or not head.mask
            or head.length != episode.arena.item_bytes
            or not self._inner.writable.is_set()
        ):
            return False
        try:
            episode.batcher.admit(1 + len(episode.arena.waiting))
            if episode.token is not None:
                episode.token.charge()
        except ActserveError:  # for the route to say
            return False
        self._episode, self._mask = episode, head.mask
        self.slot, self.begins = episode.slot, episode.steps == 0
        self._idle.clear()
        self._data = data[head.size :]
        self._seek(episode.arena)
        return True

    def _complete(self) -> None:
        assert self._episode is not None
        observation = self.observations
        unmask(observation, self._mask)
        self.since_ns = perf_counter_ns()
        try:
            self._episode.batcher.enter(self)
        except ActserveError:  # for the route to say, and perhaps to close
            self._offered = None
            self._inner.queue.put_nowait({"type": "websocket.receive", "bytes": observation.tobytes()})
            self._leave()
            self._go_on_soon()

    # what the batcher calls

    def settle(self, outcome: BatchResult, start: int) -> None:
        assert self._episode is not None
        if self.transport is None:
            self._leave()
        elif outcome.error is not None:
            self._say(frames.TEXT, self._episode.refusal(outcome.error))
        else:
            self._say(frames.BINARY, self._episode.reply(outcome, start, outcome.begun_ns - self.since_ns))

    def _say(self, first: int, payload: bytes) -> None:
        self._leave()
        self._answer_with(frames.write(first, payload))

    def _leave(self) -> None:
        """The step is over."""
        self._episode = None
        self._idle.set()
        super()._leave()


def unmask(payload: Array, mask: bytes) -> None:
    """`payload`, (n,) uint8, in place (RFC 6455, 5.3)."""
    mask *= 2
    whole = len(payload) // 8 * 8
    words = payload[:whole].view(np.uint64)
    np.bitwise_xor(words, np.uint64(int.from_bytes(mask, sys.byteorder)), out=words)
    if whole < len(payload):
        payload[whole:] ^= np.frombuffer(mask, np.uint8)[: len(payload) - whole]
