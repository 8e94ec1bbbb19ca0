"""StreamEpisode: the options of one stream, and its state from step to step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starlette.datastructures import QueryParams

from actserve import wire
from actserve.core.errors import ActserveError, InvalidRequest, UnsupportedContentType
from actserve.core.settings import Settings
from actserve.core.signature import Arrays
from actserve.engine.batch import BatchResult
from actserve.engine.policy import Policy
from actserve.server import off_loop
from actserve.server.admission import Admission, Ticket, current_token, name_of
from actserve.server.chunk_steps import chunk_steps
from actserve.server.episode_state import EpisodeState
from actserve.server.http.error_responses import error_json, log_if_internal, status_of
from actserve.server.http.requests import selected_outputs
from actserve.telemetry.counts import Tally
from actserve.wire.stream_messages import Hello, Reply, ReplyCodec

WINDOW = 8  # unanswered messages; their replies fit into any socket's buffers, which prevents a deadlock
ENCODINGS = (wire.RAW, wire.PNG, wire.SAFETENSORS)  # of binary messages; the first is the default
_BYTES_PER_ELEMENT = 32  # the longest number in JSON, with room to spare
_OVERHEAD_BYTES = 64 << 10  # for names, and the header of a safetensors message or a PNG


class StreamEpisode(EpisodeState):
    """An episode with the options in `query`. Raises `InvalidRequest`, or `UnsupportedContentType` for `binary`."""

    def __init__(
        self, policy: Policy, query: QueryParams, settings: Settings, admission: Admission, tally: Tally
    ) -> None:
        signature = policy.signature
        self._token = current_token()
        super().__init__(policy, admission, *wire.read_randomness(query), door="stream", client=name_of(self._token))
        self.tally = tally
        selected = selected_outputs(query, signature)
        outputs = tuple(spec for spec in signature.outputs if spec is signature.action or spec.name in selected)
        self.chunks = chunk_steps(signature, query, selected)
        if self.chunks is not None:
            outputs = (self.chunks.action,)
        self._encoding = query.get("binary", ENCODINGS[0])
        if self._encoding not in ENCODINGS:
            raise UnsupportedContentType(self._encoding[:80], ENCODINGS)
        # The signature of one message and its reply: the episode keeps state and noise.
        chunk = signature.chunk if self.chunks is None else None
        self._signature = replace(signature, outputs=outputs, max_batch=1, state=(), noise=(), chunk=chunk)
        self._replies = ReplyCodec(outputs)
        self.ticket: Ticket | None = None  # of a message that the fast path charged and left to the route
        self.hello = Hello(
            policy=policy.name,
            version=policy.version,
            runtime=policy.choice.runtime,
            signature=self._signature,
            offsets=self._replies.offsets,
            environment=policy.artifact.manifest.environment,
            exploration=self.exploration,
            seed=self.seed,
            window=WINDOW,
            max_message_bytes=min(admission.max_body_bytes, self._max_message_bytes()),
            idle_s=settings.session_idle_s,
        )
        self.batcher = policy.batcher
        by_default = self.seed is None and self.exploration == signature.exploration[0] and self._encoding == wire.RAW
        by_default = by_default and self.chunks is None
        arena = policy.batcher.arena
        if arena is not None and arena.is_received_into and by_default:  # otherwise the fast path cannot step it
            self.use(arena)

    def new_ticket(self) -> Ticket:
        """A ticket for one message, charged when the message is admitted."""
        return Ticket(self._token)

    async def step(self, message: Any) -> dict[str, Any]:
        """One ASGI message -> the reply. If this raises, the state has not changed."""
        ticket, self.ticket = self.ticket or self.new_ticket(), None
        self.admission.open_message(ticket)
        text = message.get("text")
        if text is None:
            encoding, body = self._encoding, bytearray(message["bytes"])  # a writable copy
        else:
            encoding, body = wire.JSON, bytearray(text.encode())
        takes_long = wire.takes_long(encoding, body)
        items = await off_loop.call(wire.decode, encoding, body, self._signature, takes_long=takes_long)
        if items.batched:
            raise InvalidRequest(f"expected one item, as a stream takes at each step; got a batch of {items.size}")
        if items.metadata:
            raise InvalidRequest(f"expected {', '.join(items.metadata)} in the stream's query; got it with a message")
        acted = await self.act(items.tensors)
        self.tally.answered += 1
        reply = self._reply(acted.outputs, 0, acted.queue_ns, acted.run_ns)
        if text is None:
            return {"type": "websocket.send", "bytes": self._replies.pack(reply)}
        return {"type": "websocket.send", "text": self._replies.to_json(reply)}

    def reply(self, outcome: BatchResult, start: int, queue_ns: int) -> bytes:
        """The reply to a binary message that the fast path has stepped; the arena has the state."""
        self.steps += 1
        self.tally.answered += 1
        return self._replies.pack(self._reply(outcome.outputs, start, queue_ns, outcome.run_ns))

    def refusal(self, error: ActserveError) -> bytes:
        """The reply to a message that the fast path could not step; the state has not changed."""
        return self.error_json(error).encode()

    def error_json(self, error: ActserveError) -> str:
        """The reply to a message that raised `error`; counts it."""
        log_if_internal(error)
        status = status_of(error)
        self.tally.add(str(status), error.code)
        return error_json(error.code, error.message, error.detail, status=status, step=self.steps + 1).decode()

    def _reply(self, results: Arrays, start: int, queue_ns: int, run_ns: int) -> Reply:
        outputs = {spec.name: results[spec.name][start] for spec in self._signature.outputs}
        return Reply(self.steps, outputs, queue_ns // 1000, run_ns // 1000)

    def _max_message_bytes(self) -> int:
        """The size of one item in the largest encoding."""
        elements = sum(spec.elements for spec in self._signature.request_inputs)
        return _OVERHEAD_BYTES + _BYTES_PER_ELEMENT * elements
