"""One connection of the fast lane: an `asyncio.BufferedProtocol` that holds uvicorn's own protocol.

Between two requests of uvicorn's it looks at the head of what comes. If the lane takes the request, its body goes from
the socket into a row of the arena, and the answer is one write. If not, every byte goes to uvicorn's protocol, until
that has answered and its parser is between two messages again.

Where bytes go next (`get_buffer`):

    the rest of a body    into its row, to its end and no further
    a refused body        nowhere, or into the common buffer, to its end and no further
    uvicorn's             into the common buffer, and on
    sent ahead            into the common buffer, and kept until the answer has left
    else, a head          into the common buffer, as many bytes as the last head had: if the next one is as long, which
                          is the rule, the body behind it is read to where it belongs and not moved again
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from time import perf_counter_ns
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from actserve import wire
from actserve.core.errors import ActserveError, TooManyConnections
from actserve.engine.batcher import BatchResult
from actserve.server.fastpath.discard import discard
from actserve.server.fastpath.endpoints import UNAVAILABLE, Endpoint, FastPath, serialised
from actserve.server.fastpath.heads import MAX_BYTES, RequestHead, may_become_a_head
from actserve.server.fastpath.receiver import BUFFER_BYTES, Receiver
from actserve.server.fastpath.uvicorn_protocol import UvicornProtocol
from actserve.server.http import error_responses as errors

GUESS_BYTES = 512  # of a first head
LAST_S = 0.25  # for a request that is on its way when the service is told to end
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Phase(Enum):
    """What a connection is doing."""

    IDLE = auto()  # between two requests
    RECEIVING = auto()  # a request
    ANSWERING = auto()
    SENDING = auto()  # an answer, which the client has not taken


class FastPathProtocol(Receiver):
    """A connection is also the request that it has under way: nothing is made anew for each."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(UvicornProtocol(config, server_state, app_state, _loop))
        self._inner.outer = self
        self._state = server_state
        self._connections: set[Any] = server_state.connections
        self._lane: FastPath | None = app_state.get("lane")
        self._door: Endpoint | None = None  # of the request that is being received or answered
        self._unwanted = 0  # bytes of a refused body that are still to come
        self._guess = GUESS_BYTES  # how long the next head is
        self._passing = False  # to the inner protocol
        self._closing = False  # after the answer
        self._requests = 0  # that have begun, here or there
        self._before: tuple[Phase, int] = (Phase.IDLE, -1)  # when the lane last looked
        self._looks = 0  # since it is so

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._inner.connection_made(transport)
        self._connections.discard(self._inner)
        self._connections.add(self)
        self._passing = self._lane is None
        if self._lane is None:
            return
        self._lane.connections.add(self)
        if len(self._connections) > self._lane.max_connections:
            error = TooManyConnections(f"{self._lane.max_connections} connections are open, the most that may be")
            self._lane.count(UNAVAILABLE, error.code)
            self.transport.write(serialised(errors.response(error), self._state.default_headers))
            self.transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._missing is not None:
            return self._missing
        if self._unwanted:
            self._unwanted -= discard(self.transport, self._unwanted)
        if self._unwanted:
            return self._buffer[: self._unwanted]
        if self._passing or self._door is not None:
            return self._buffer
        return self._buffer[: self._guess]

    def buffer_updated(self, count: int) -> None:
        if self._missing is not None:
            self._received(count)
        elif self._unwanted:
            self._unwanted -= count
        elif self._door is not None:
            self._keep(count)
        elif self._passing and not self._inner.rests:
            self._inner.data_received(bytes(self._buffer[:count]))
        else:
            self._begin(self._data + self._buffer[:count])

    def connection_lost(self, error: Exception | None) -> None:
        self.forget()
        self._inner.connection_lost(error)
        self.transport = None
        if self._missing is not None:
            self._leave()

    # what uvicorn's server calls

    def shutdown(self) -> None:
        """Answer what is under way, or what the client has just sent, then close."""
        self._closing = self._inner.closing = True
        if self._door is None:
            self._inner.loop.call_later(LAST_S, self._end)

    def _end(self) -> None:
        if self.transport is not None and self._door is None:
            self._inner.shutdown()

    # what uvicorn's protocol calls

    def forget(self) -> None:
        """The connection is another protocol's now, which has time-outs of its own; or it is no more."""
        self._connections.discard(self)
        if self._lane is not None:
            self._lane.connections.discard(self)

    # a request comes

    def _begin(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if may_become_a_head(data):
                self._data, self._guess = data, MAX_BYTES
            else:
                self._pass(data)
            return
        assert self._lane is not None
        taken = self._lane.find(data[:end])
        if taken is None:
            self._pass(data)
            return
        if not taken.items and len(data) < end + taken.body_bytes:  # compressed: not before it is all there
            self._data, self._guess = data, BUFFER_BYTES
            return
        door, self.patience_ns = taken.door, taken.patience_ns
        self.since_ns = perf_counter_ns()
        self._requests += 1
        if self._inner.timeout_keep_alive_task is not None:
            self._inner._unset_keepalive_if_required()
        self._passing = False
        self._guess, self._data = end, data[end:]
        self._door = door
        try:
            if taken.token is not None:
                taken.token.charge()
                taken.token.owe(max(1, taken.items) - 1)
            door.batcher.admit(max(1, taken.items) + len(door.arena.waiting), self.patience_ns)
        except ActserveError as error:
            self._refuse(door, error, taken.body_bytes)
            return
        if not taken.items:
            self._expand(taken, data, end)
            return
        self.size = taken.items
        if taken.items == 1:
            self._seek(door.arena)
        else:
            self._receive(door.arena, None)

    def _expand(self, taken: RequestHead[Endpoint], data: bytes, end: int) -> None:
        """A compressed observation, all of which is in `data`; what is anything else is for the route to refuse."""
        arena = taken.door.arena
        stop = end + taken.body_bytes
        try:
            expanded = wire.expand(data[end:stop], "zstd", arena.item_bytes)
        except ActserveError:
            expanded = b""
        if len(expanded) != arena.item_bytes:
            self._door = None
            self._pass(data)
            return
        self._guess, self.size = BUFFER_BYTES, 1
        self._data = data[stop:]
        self._place(arena, arena.acquire())[:] = expanded
        self._complete()

    def _pass(self, data: bytes) -> None:
        self._data, self._guess = b"", GUESS_BYTES
        self._passing = True
        self._requests += 1
        self._inner.data_received(data)

    def _refuse(self, door: Endpoint, error: ActserveError, size: int) -> None:
        """Before the body of `size` bytes is here; what comes of it is forgotten."""
        data = self._data
        self._unwanted, self._data = max(0, size - len(data)), data[size:]
        self._answer(door.refusal(error, self._state.default_headers))

    def _complete(self) -> None:
        assert self._door is not None
        try:
            self._door.batcher.enter(self)
        except ActserveError as error:
            self._answer(self._door.refusal(error, self._state.default_headers))

    # what the batcher calls

    def settle(self, outcome: BatchResult, start: int) -> None:
        assert self._door is not None
        if self.transport is None:
            self._leave()
        elif outcome.error is not None:
            self._answer(self._door.refusal(outcome.error, self._state.default_headers))
        else:
            self._answer(self._door.answer(outcome, start, self.size, self._state.default_headers))

    def _answer(self, answer: bytes) -> None:
        self._leave()
        self._state.total_requests += 1
        if self._closing:
            self.transport.write(answer.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
            self.transport.close()
            return
        self._answer_with(answer)

    def _leave(self) -> None:
        """The request is over."""
        self._door = None
        super()._leave()

    # what the lane calls, once a second

    def look(self) -> None:
        """Close the connection if it has been waiting for the client for too long."""
        assert self._lane is not None
        now = (self._phase, self._requests)
        self._looks = self._looks + 1 if now == self._before else 0
        self._before = now
        phase, _ = now
        if phase is Phase.IDLE and self._looks >= self._inner.timeout_keep_alive:
            self.transport.close()
        elif phase is Phase.RECEIVING and self._looks >= self._lane.patience_s:
            self._lane.count("408", "too_slow")
            self.transport.write(TOO_SLOW)
            self.transport.close()
        elif phase is Phase.SENDING and self._looks >= self._lane.patience_s:
            self.transport.abort()

    @property
    def _phase(self) -> Phase:
        if self.transport.get_write_buffer_size():
            return Phase.SENDING
        if self._missing is not None or self._unwanted:
            return Phase.RECEIVING
        if self._door is not None:
            return Phase.ANSWERING
        if self._data or (self._passing and not self._inner.between):
            return Phase.RECEIVING
        if self._passing and not self._inner.rests:
            return Phase.ANSWERING
        return Phase.IDLE
