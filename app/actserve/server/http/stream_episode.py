"""StreamEpisode: the options of one stream, and its messages."""

from __future__ import annotations

from dataclasses import replace

from starlette.datastructures import QueryParams

from actserve import wire
from actserve.core.errors import ActserveError, InvalidRequest, UnsupportedContentType
from actserve.core.settings import Settings
from actserve.core.signature import Array, Arrays
from actserve.engine.policy import Policy
from actserve.engine.recorders import Feedback
from actserve.server import off_loop
from actserve.server.admission import Admission, current_token
from actserve.server.episode_state import EpisodeState, Step
from actserve.server.http.episode_socket import Message, SteppableEpisode
from actserve.server.http.error_responses import error_json, status_of
from actserve.telemetry.counts import STREAM, Tally
from actserve.wire.stream_messages import Hello, Reply, ReplyCodec, read_result

WINDOW = 8  # unanswered messages; their replies fit into any socket's buffers, which prevents a deadlock
ENCODINGS = (wire.RAW, wire.PNG, wire.SAFETENSORS)  # of binary messages; the first is the default
_BYTES_PER_ELEMENT = 32  # the longest number in JSON, with room to spare
_OVERHEAD_BYTES = 64 << 10  # for names, and the header of a safetensors message or a PNG


class StreamEpisode(SteppableEpisode):
    """An episode with the options in `query`. Raises as `EpisodeState`, and `UnsupportedContentType` for `binary`."""

    route = STREAM

    def __init__(
        self, policy: Policy, query: QueryParams, settings: Settings, admission: Admission, tally: Tally
    ) -> None:
        signature = policy.signature
        self._encoding = query.get("binary", ENCODINGS[0])
        if self._encoding not in ENCODINGS:
            raise UnsupportedContentType(self._encoding[:80], ENCODINGS)
        self._state = state = EpisodeState(policy, admission, tally, current_token(), query, "stream")
        # The signature of one message and its reply: the episode keeps state and noise.
        chunk = signature.chunk if state.chunks is None else None
        self._signature = replace(signature, outputs=state.outputs, max_batch=1, state=(), noise=(), chunk=chunk)
        self._replies = ReplyCodec(state.outputs)
        self.hello = Hello(
            policy=policy.name,
            version=policy.version,
            runtime=policy.choice.runtime,
            signature=self._signature,
            offsets=self._replies.offsets,
            environment=policy.artifact.manifest.environment,
            exploration=state.exploration,
            seed=state.seed,
            window=WINDOW,
            max_message_bytes=min(admission.max_body_bytes, self._largest_bytes()),
            idle_s=settings.session_idle_s,
            recorded=state.is_recorded,
        )
        self._told_step = 0  # the last step whose result the client told
        self._observations = {spec.name for spec in signature.observations}
        self.in_place = self._encoding == wire.RAW and state.arena is not None and state.arena.is_received_into

    @property
    def state(self) -> EpisodeState:
        return self._state

    @property
    def max_message_bytes(self) -> int:
        return self.hello.max_message_bytes

    def greeting(self) -> str:
        return self.hello.to_json()

    async def answer(self, message: Message) -> Message:
        if isinstance(message, str):
            encoding, body = wire.JSON, bytearray(message.encode())
        else:
            encoding, body = self._encoding, bytearray(message)  # a writable copy
        takes_long = wire.takes_long(encoding, body)
        items = await off_loop.call(wire.decode, encoding, body, self._signature, takes_long=takes_long)
        if items.batched:
            raise InvalidRequest(f"expected one item, as a stream takes at each step; got a batch of {items.size}")
        if items.metadata:
            raise InvalidRequest(f"expected {', '.join(items.metadata)} in the stream's query; got it with a message")
        step = await self._state.act(items.tensors)
        return self._replies.to_json(self._reply(step)) if isinstance(message, str) else self.reply(step)

    def notes(self, message: Message) -> bool:
        told = read_result(message) if isinstance(message, str) else None
        if told is None:
            return False
        if self._told_step == self._state.steps:  # one for each step is free
            self._state.open_message()
        self._told_step = self._state.steps
        self._state.tell(Feedback(told.reward, told.done))
        return True

    def refusal(self, error: ActserveError) -> str:
        step = self._state.steps + 1
        return error_json(error.code, error.message, error.detail, status=status_of(error), step=step).decode()

    def takes(self, size_bytes: int) -> bool:
        if self._state.arena is not None and self.in_place:
            return size_bytes == self._state.arena.item_bytes
        return self._state.chunks is None and size_bytes <= self.max_message_bytes

    def read(self, message: Array) -> Arrays | None:
        body = message.data
        if wire.takes_long(self._encoding, body):
            return None
        items = wire.decode(self._encoding, body, self._signature)
        is_step = not items.batched and not items.metadata and items.tensors.keys() == self._observations
        return items.tensors if is_step else None

    def reply(self, step: Step) -> bytes:
        return self._replies.pack(self._reply(step))

    def _reply(self, step: Step) -> Reply:
        return Reply(self._state.steps, step.outputs, step.queue_ns // 1000, step.run_ns // 1000)

    def _largest_bytes(self) -> int:
        """The size of one item in the largest encoding."""
        elements = sum(spec.elements for spec in self._signature.request_inputs)
        return _OVERHEAD_BYTES + _BYTES_PER_ELEMENT * elements
