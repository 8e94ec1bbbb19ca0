"""One HTTP connection: an `asyncio.BufferedProtocol` in front of uvicorn's own protocol.

Between two requests it looks at the head of the next one. If the request takes the fast path, its body is received
into a row of the arena, or into other memory and decoded from there, and the answer is one write. If not, every byte
goes to uvicorn's protocol until that has answered.

`get_buffer` decides where the next bytes go:

    the rest of a body            into its row, up to its end
    the rest of a refused body    dropped, up to its end
    uvicorn's request             into the common buffer, and on to uvicorn
    a request sent ahead          into the common buffer, and kept until the answer is written
    a head                        into the common buffer, as many bytes as the last head had: the next head is mostly
                                  as long, and then its body is received in place without a copy
"""

from __future__ import annotations

import asyncio
import logging
from enum import Enum, auto
from functools import partial
from time import perf_counter_ns
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from actserve.core.errors import ActserveError, MemoryFull, TooManyConnections, Unavailable
from actserve.core.signature import Arrays
from actserve.engine.batch import BatchResult
from actserve.server.admission import Ticket, name_of
from actserve.server.fastpath.act_codec import UNAVAILABLE
from actserve.server.fastpath.codec import Codec, DecodedRequest, serialised
from actserve.server.fastpath.discard import descriptor, discard
from actserve.server.fastpath.fast_path import FastPath
from actserve.server.fastpath.receiver import BUFFER_BYTES, Receiver
from actserve.server.fastpath.request_heads import MAX_BYTES, RequestHead, may_become_a_head
from actserve.server.fastpath.session_step import SessionStep
from actserve.server.fastpath.uvicorn_protocol import UvicornProtocol
from actserve.server.http import error_responses as errors
from actserve.server.memory import CONNECTION_BYTES, Memory
from actserve.wire import as_raw
from actserve.wire.npy_header import MAGIC
from actserve.wire.payload import Body

log = logging.getLogger("actserve")

MAGIC_BYTES = len(MAGIC)
SMALL_BYTES = 4096  # a body that is received with its head; a larger one is received where it is read
FIRST_HEAD_BYTES = 512  # assumed length of a connection's first head
LINGER_S = 0.25  # at shutdown, for a request that is on its way
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Phase(Enum):
    """The state of a connection."""

    IDLE = auto()  # between two requests
    RECEIVING = auto()
    ANSWERING = auto()
    SENDING = auto()  # the client has not read the whole answer


class FastPathProtocol(Receiver):
    """A connection is also its request in progress: no object is created for each request."""

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
        self._fast_path: FastPath | None = app_state.get("fast_path")
        self._codec: Codec | None = None  # of the request that is being received or answered
        self._head: RequestHead | None = None  # of a body that the codec reads
        self._head_data = b""
        self._decoded: DecodedRequest | None = None  # by the codec; None: received in place
        self._step: SessionStep | None = None
        self._request_id: bytes | None = None  # returned in the answer
        self._to_discard = 0  # remaining bytes of a refused body
        self._fd: int | None = None  # to discard from
        self._head_bytes = FIRST_HEAD_BYTES  # expected length of the next head
        self._passing = False  # bytes go to uvicorn's protocol
        self._closing = False  # after the next answer
        self._input_ended = False  # the client sends no more
        self._holds_memory = False
        self._requests = 0  # started on this connection, on the fast path or not
        self._before: tuple[Phase, int] = (Phase.IDLE, -1)  # at the last `close_if_idle`
        self._unchanged_s = 0

    # called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._inner.connection_made(transport)
        self._connections.discard(self._inner)
        self._connections.add(self)
        self._passing = self._fast_path is None
        if self._fast_path is None:
            return
        self._fd = descriptor(transport)
        self._fast_path.connections.add(self)
        try:
            limit = self._fast_path.max_connections
            if len(self._connections) > limit:
                raise TooManyConnections(f"the service takes at most {limit} connections, and all are open")
            self._fast_path.admission.memory.take(CONNECTION_BYTES)
            self._holds_memory = True
        except Unavailable as error:
            self._fast_path.count(UNAVAILABLE, error.code)
            self.transport.write(serialised(errors.response(error), self._state.default_headers))
            self.transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._missing is not None:
            return self._missing
        if self._to_discard:
            if self._fd is not None:
                self._to_discard -= discard(self._fd, self._to_discard)
            if self._to_discard:
                return self._buffer[: self._to_discard]
        if self._passing or self._codec is not None:
            return self._buffer
        return self._buffer[: self._head_bytes]

    def buffer_updated(self, count: int) -> None:
        try:
            if self._missing is not None:
                self._received(count)
            elif self._to_discard:
                self._to_discard -= count
            elif self._codec is not None:
                self._keep(count)
            elif self._passing and not self._inner.is_idle:
                self._inner.data_received(bytes(self._buffer[:count]))
            else:
                self._begin(self._data + self._buffer[:count])
        except MemoryFull as error:
            assert self._codec is not None
            self._refuse_memory(self._codec, error)
        except Exception:  # the request is not queued: the last thing that it does is to enter the queue
            self.abandon()
            raise  # for the log of the event loop

    def connection_lost(self, error: Exception | None) -> None:
        self.forget()
        self._inner.connection_lost(error)
        self.transport = None
        if self._missing is not None:
            self._leave()

    def eof_received(self) -> bool | None:
        """A client may close its side after its last request, and wait for the answers (RFC 9112, 9.6)."""
        if self.transport.get_extra_info("ssl_object") is not None:
            return None  # with TLS this closes both sides
        self._input_ended = True
        if self._codec is None and self._data:
            self._go_on_soon()
            return True
        return self._stays_open()

    def _stays_open(self) -> bool:
        """Whether the connection of a client that sends no more stays open, for an answer. Then it is closed."""
        if self._missing is not None or self._to_discard:
            return False
        if self._codec is not None:
            self._closing = not self._data  # otherwise a request that was sent ahead is answered first
            return True
        return self._passing and self._inner.end_input()

    def _go_on(self) -> None:
        super()._go_on()
        if self._input_ended and self.transport is not None and not self._stays_open():
            self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read its answers: nothing more is read from it until it does."""
        super().pause_writing()
        self._waits_for_reader = True
        if self._missing is None:
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._waits_for_reader = False
        if not self.waits_for_row:
            self.transport.resume_reading()
        self._go_on_soon()

    # called by uvicorn's server

    def shutdown(self) -> None:
        """Answer the request in progress, or one that the client has just sent, then close."""
        self._closing = self._inner.closing = True
        if self._codec is None:
            self._inner.loop.call_later(LINGER_S, self._end)

    def _end(self) -> None:
        if self.transport is not None and self._codec is None:
            self._inner.shutdown()

    # called by uvicorn's protocol

    def forget(self) -> None:
        """The connection has closed, or belongs to a WebSocket now, which has time-outs of its own."""
        self._connections.discard(self)
        if self._fast_path is not None:
            self._fast_path.connections.discard(self)
            if self._holds_memory:
                self._holds_memory = False
                self._fast_path.admission.memory.give_back(CONNECTION_BYTES)

    # a request arrives

    def _begin(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if may_become_a_head(data):
                self._data, self._head_bytes = data, MAX_BYTES
            else:
                self._pass(data)
            return
        assert self._fast_path is not None
        head = self._fast_path.find(data[:end])
        if head is None:
            self._pass(data)
            return
        step = None
        if head.session is not None:
            step = SessionStep.begin(self._fast_path.sessions, head)
            if step is None:
                self._pass(data)
                return
        self._take(head, data, end, step)

    def _take(self, head: RequestHead, data: bytes, end: int, step: SessionStep | None) -> None:
        """Take the request at the start of `data`. Its head ends at `end`."""
        self._codec, self._request_id, self.patience_ns = head.codec, head.request_id, head.patience_ns
        self._step = step
        recorder = head.codec.endpoint.policy.recorder
        if step is not None:
            self.recorder = step.recorder
        elif recorder is not None:
            self.recorder = recorder.request(name_of(head.token))
        self.since_ns = perf_counter_ns()
        self._requests += 1
        if self._inner.timeout_keep_alive_task is not None:
            self._inner._unset_keepalive_if_required()
        self._passing = False
        self._data = data[end:]
        try:
            if head.items:
                self._head_bytes = end
                self._receive_in_place(head)
            else:
                self._head_bytes = BUFFER_BYTES if head.body_bytes <= SMALL_BYTES else end
                self._receive_and_read(head, data[:end])
        except MemoryFull as error:
            self._refuse_memory(head.codec, error)

    def _receive_in_place(self, head: RequestHead) -> None:
        assert self._fast_path is not None
        endpoint, admission = head.codec.endpoint, self._fast_path.admission
        self.size = head.items
        try:
            admission.admit(endpoint.batcher, self.size, Ticket(head.token), self.patience_ns)
        except ActserveError as error:
            self._refuse(head.codec, error, head.body_bytes)
            return
        self._set_state(None, None)
        if head.items == 1:
            self._seek(endpoint.arena)
        else:
            self._receive_batch(endpoint.arena, admission)

    def _receive_and_read(self, head: RequestHead, head_data: bytes) -> None:
        assert self._fast_path is not None
        endpoint = head.codec.endpoint
        try:
            self._fast_path.admission.check(endpoint.batcher, Ticket(head.token), self.patience_ns)
        except ActserveError as error:
            self._refuse(head.codec, error, head.body_bytes)
            return
        self._head, self._head_data = head, head_data
        if len(self._data) >= head.body_bytes:
            body, self._data = self._data[: head.body_bytes], self._data[head.body_bytes :]
            self._read(body)
        else:
            self._receive_body(head.body_bytes, endpoint.arena)

    def _read(self, body: Body) -> None:
        """Handle a complete body that the codec reads. If it declines, the routes get the whole request."""
        head, fast_path = self._head, self._fast_path
        assert head is not None
        assert fast_path is not None
        decoded = head.codec.read(body, head.token)
        if decoded is not None and decoded.sequence is not None:
            self._step = SessionStep.of_sequence(fast_path.sessions, decoded.sequence, head)
            self.recorder = None if self._step is None else self._step.recorder
        if decoded is None or (decoded.sequence is not None and self._step is None):
            request = b"".join([self._head_data, bytes(body), self._data])
            self._leave()
            self._pass(request)
            return
        endpoint = head.codec.endpoint
        self.size, self._decoded = decoded.size, decoded
        try:
            fast_path.admission.admit(endpoint.batcher, self.size, Ticket(head.token), self.patience_ns)
            self._place(decoded.tensors, endpoint.arena)
            self._set_state(decoded.state, decoded.is_init)
            fast_path.admission.enter(endpoint.batcher, self)
        except ActserveError as error:
            self._answer(head.codec.refusal(error, self._state.default_headers, decoded))

    def _set_state(self, state: Arrays | None, is_init: bool | None) -> None:
        """Put the state of the episode into a slot: what the client carries, the session's, or the initial state."""
        assert self._codec is not None
        arena = self._codec.endpoint.arena
        if self._step is not None:
            state, self._step.is_init = self._step.state, is_init
        self.slot = arena.keep(state)
        self.begins = not state if is_init is None else is_init

    def _pass(self, data: bytes) -> None:
        self._data, self._head_bytes = b"", FIRST_HEAD_BYTES
        self._passing = True
        self._requests += 1
        self._inner.data_received(data)

    def _refuse(self, codec: Codec, error: ActserveError, body_bytes: int) -> None:
        """Answer before the body has come, and discard the body."""
        data = self._data
        self._to_discard, self._data = max(0, body_bytes - len(data)), data[body_bytes:]
        self._answer(codec.refusal(error, self._state.default_headers))

    def _refuse_memory(self, codec: Codec, error: MemoryFull) -> None:
        self._closing = True  # the rest of the body is not read
        self._answer(codec.refusal(error, self._state.default_headers))

    def _complete(self) -> None:
        assert self._codec is not None
        assert self._fast_path is not None
        if self._head is not None:
            assert self._block is not None
            self._read(self._block.data)
            return
        endpoint = self._codec.endpoint
        try:
            if self.size > 1:
                (observation,) = endpoint.policy.signature.observations
                as_raw.refuse_npy(self.observations[:MAGIC_BYTES].tobytes(), observation)
            self._fast_path.admission.enter(endpoint.batcher, self)
        except ActserveError as error:
            self._answer(self._codec.refusal(error, self._state.default_headers))

    # called by the batcher

    def settle(self, outcome: BatchResult, start: int) -> None:
        assert self._codec is not None
        if self.transport is None:  # a step of a session is not stored: the client can take it again
            self._leave()
        elif outcome.error is not None:
            self._answer(self._codec.refusal(outcome.error, self._state.default_headers, self._decoded))
        elif self._step is None:
            self._answer_with_outputs(outcome, start)
        else:
            self._step.store(outcome, start, partial(self._stored, self._step, outcome, start))

    def _stored(self, step: SessionStep, outcome: BatchResult, start: int, result: bool | ActserveError) -> None:
        """Answer a step of a session. Never raises: other steps of the batch follow."""
        if self._step is not step or self._codec is None:  # the connection was abandoned
            return
        try:
            if isinstance(result, ActserveError):
                self._answer(self._codec.refusal(result, self._state.default_headers))
            elif result:
                self._answer_with_outputs(outcome, start, step.fields())
            else:
                finishing = self._inner.loop.create_task(self._finish(step, self._codec))
                self._state.tasks.add(finishing)
                finishing.add_done_callback(self._state.tasks.discard)
        except Exception:
            log.exception("a step of a session could not be answered; its connection is closed")
            self.abandon()

    async def _finish(self, step: SessionStep, codec: Codec) -> None:
        """Answer a step of a session that could not be stored at once."""
        assert self._fast_path is not None
        names = {spec.name for spec in codec.endpoint.policy.signature.observations}
        try:
            observations = {name: array.copy() for name, array in self.inputs().items() if name in names}
            result = await step.finish(self._fast_path.registry, observations)
            outcome = BatchResult(result.acted.outputs, None, perf_counter_ns(), 0)
            self._answer_with_outputs(outcome, 0, step.fields(result))
        except ActserveError as error:
            self._answer(codec.refusal(error, self._state.default_headers))
        except Exception:
            log.exception("the step of a session could not be stored; its connection is closed")
            self.abandon()

    def _answer_with_outputs(self, outcome: BatchResult, start: int, fields: bytes = b"") -> None:
        assert self._codec is not None
        headers = self._state.default_headers
        self._answer(self._codec.answer(outcome, start, self.size, self._decoded, headers, fields))

    def _answer(self, answer: bytes) -> None:
        if self.transport is None:
            self._leave()
            return
        if self._request_id is not None:
            answer = _with_header(answer, b"x-request-id: " + self._request_id)
        self._leave()
        self._state.total_requests += 1
        if self._closing:
            self.transport.write(_with_header(answer, b"connection: close"))
            self.transport.close()
            return
        self._answer_with(answer)

    def _leave(self) -> None:
        if self._codec is not None:
            arena = self._codec.endpoint.arena
            arena.forget(self.slot)
            for block in () if self._decoded is None else self._decoded.lent:
                arena.take_back(block)
        self.slot = None
        self._codec = self._request_id = self._head = self._decoded = self._step = None
        self._head_data = b""
        super()._leave()

    # called by the fast path once a second

    def close_if_idle(self) -> None:
        """Close the connection if it has waited for the client for too long."""
        assert self._fast_path is not None
        now = (self._phase, self._requests)
        self._unchanged_s = self._unchanged_s + 1 if now == self._before else 0
        self._before = now
        phase, _ = now
        if phase is Phase.IDLE and self._unchanged_s >= self._inner.timeout_keep_alive:
            self.transport.close()
        elif phase is Phase.RECEIVING and self._unchanged_s >= self._fast_path.patience_s:
            self._fast_path.count("408", "too_slow")
            self.transport.write(TOO_SLOW)
            self.transport.close()
        elif phase is Phase.SENDING and self._unchanged_s >= self._fast_path.patience_s:
            self.transport.abort()

    @property
    def _memory(self) -> Memory:
        assert self._fast_path is not None
        return self._fast_path.admission.memory

    @property
    def held_bytes(self) -> int:
        ahead: int = self._inner.held_bytes
        return super().held_bytes + ahead

    @property
    def _phase(self) -> Phase:
        if self.transport.get_write_buffer_size():
            return Phase.SENDING
        if self._missing is not None or self._to_discard:
            return Phase.RECEIVING
        if self._codec is not None:
            return Phase.ANSWERING
        if self._data or (self._passing and not self._inner.between_messages):
            return Phase.RECEIVING
        if self._passing and not self._inner.is_idle:
            return Phase.ANSWERING
        return Phase.IDLE


def _with_header(answer: bytes, field: bytes) -> bytes:
    return answer.replace(b"\r\n\r\n", b"\r\n" + field + b"\r\n\r\n", 1)
