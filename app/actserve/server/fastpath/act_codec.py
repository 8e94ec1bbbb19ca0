"""The fast path of `/act`: observations and state in any encoding, and the prebuilt answers."""

from __future__ import annotations

import re

from actserve import wire
from actserve.core.errors import ActserveError, Unavailable
from actserve.core.settings import Settings
from actserve.engine.batch import BatchResult
from actserve.engine.registry import Registry
from actserve.server.access.tokens import Token
from actserve.server.fastpath.codec import (
    Codec,
    DecodedRequest,
    Headers,
    Resource,
    Resources,
    serialised,
    split_state,
)
from actserve.server.fastpath.endpoint import Endpoint
from actserve.server.http import error_responses as errors
from actserve.telemetry.counts import ACT, ACT_ON_VERSION, Tally
from actserve.wire.payload import MANY_BYTES, Body, takes_long

UNAVAILABLE = str(errors.STATUS[Unavailable])
MAX_REFUSALS = 64  # cached
MAX_ANSWERS = 4096  # cached; a policy with more actions has each answer built
MAX_CODECS = 256  # cached
_OUTPUTS = re.compile(rb"outputs=([A-Za-z0-9_.,-]+)")


def act_resources(endpoint: Endpoint, registry: Registry, settings: Settings) -> Resources:
    """The resources of `/act` for the policy of `endpoint`."""
    policy = endpoint.policy
    by_name = ActResource(endpoint, registry.counts.tally(policy.name, "fastpath", ACT), settings.max_body_bytes)
    by_version = ActResource(
        endpoint, registry.counts.tally(policy.name, "fastpath", ACT_ON_VERSION), settings.max_body_bytes
    )
    resources: dict[str, Resource] = {
        f"/policies/{policy.name}/act": by_name,
        f"/policies/{policy.name}/versions/{policy.version}/act": by_version,
    }
    if policy.name == registry.default:
        resources["/act"] = by_name
    return {path.encode(): resource for path, resource in resources.items()}


class ActResource:
    """The requests for actions of one policy."""

    def __init__(self, endpoint: Endpoint, tally: Tally, max_body_bytes: int) -> None:
        self._endpoint, self._tally = endpoint, tally
        self._max_body_bytes = max_body_bytes
        self._codecs: dict[tuple[str, ...], ActCodec | None] = {}

    def codec(self, fields: dict[bytes, bytes], query: bytes) -> ActCodec | None:
        found = _OUTPUTS.fullmatch(query)
        if query and found is None:
            return None
        content_type = fields.pop(b"content-type", b"").decode("ascii")
        if not content_type:
            return None
        coding, accept = fields.pop(b"content-encoding", b""), fields.pop(b"accept", b"")
        session = "session" if b"x-session" in fields else ""
        outputs = found[1].decode("ascii") if found else ""
        key = (content_type, coding.decode("ascii"), accept.decode("ascii"), outputs, session)
        if key not in self._codecs:
            if len(self._codecs) >= MAX_CODECS:
                self._codecs.clear()
            try:
                self._codecs[key] = ActCodec(self._endpoint, self._tally, self._max_body_bytes, *key)
            except ActserveError:
                self._codecs[key] = None
        codec = self._codecs[key]
        return codec if codec is not None and codec.max_items else None


class ActCodec(Codec):
    """Requests for actions. Raises an `InvalidRequest` that the route answers with."""

    def __init__(
        self,
        endpoint: Endpoint,
        tally: Tally,
        max_body_bytes: int,
        content_type: str,
        coding: str,
        accept: str,
        outputs: str,
        session: str,
    ) -> None:
        signature = endpoint.policy.signature
        names = list(signature.select([name for name in outputs.split(",") if name]))
        if not session:
            names += [state.spec.name for state in signature.state]
        super().__init__(endpoint, tally, names, single=bool(session))
        self._coding, self._accept, self._for_session = coding, accept, bool(session)
        self._limit_bytes = min(MANY_BYTES, max_body_bytes)
        self._media_type = wire.media_type_of(content_type)
        self._decode = wire.decoder(content_type, signature, values=False)
        self.in_place = not coding and endpoint.arena.is_received_into and wire.is_raw(content_type, signature)
        self._content_type = wire.negotiate(accept, len(names))
        action = signature.action
        discrete = action.shape == () and action.numpy_dtype.kind in "iu"
        self._action = action.name if discrete and names == [action.name] else None
        self._answers: dict[int, bytes] = {}  # by action
        self._refusals: dict[str, bytes] = {}  # by the error's message
        self._refusal_headers: Headers = []

    def read(self, body: Body, token: Token | None) -> DecodedRequest | None:
        if takes_long(self._media_type, body):
            return None
        try:
            if self._coding:
                body = wire.expand(body, self._coding, self._limit_bytes)
                if takes_long(self._media_type, body):
                    return None
            payload = self._decode(body)
        except ActserveError:
            return None
        tensors, batched, size = payload.tensors, payload.batched, payload.size
        if payload.seed is not None or payload.exploration or payload.session or not self._takes(tensors, size):
            return None
        if batched and self.max_items == 1:
            return None
        if not self._signature.state:
            return DecodedRequest(tensors, size, batched)
        state, is_init = split_state(tensors, self._signature)
        if state is not None and self._for_session:
            return None
        return DecodedRequest(tensors, size, batched, state, is_init)

    def _write(self, outcome: BatchResult, start: int, size: int, decoded: DecodedRequest | None) -> bytes:
        batched = size > 1 if decoded is None else decoded.batched
        if self._action is None or batched:
            return self._build(outcome, start, size, batched)
        action = int(outcome.outputs[self._action][start])
        answer = self._answers.get(action)
        if answer is None:
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
            answer = self._answers[action] = self._build(outcome, start, size, batched)
        return answer

    def _build(self, outcome: BatchResult, start: int, size: int, batched: bool) -> bytes:
        outputs = {name: outcome.outputs[result][start : start + size] for name, result in self._results.items()}
        _, content = wire.encode(self._accept, outputs, self._signature.answers, batched)
        version = self.endpoint.policy.version
        head = (
            f"{wire.VERSION_HEADER}: {version}\r\n"
            f"content-length: {len(content)}\r\ncontent-type: {self._content_type}\r\n\r\n"
        )
        return head.encode() + content

    def refusal(self, error: ActserveError, headers: Headers, decoded: DecodedRequest | None = None) -> bytes:
        if not isinstance(error, Unavailable):  # rare, and logged
            response = errors.response(error)
            self._tally.add(str(response.status_code), error.code)
            return serialised(response, headers)
        self._tally.add(UNAVAILABLE, error.code)
        if headers is not self._refusal_headers or len(self._refusals) > MAX_REFUSALS:
            self._refusal_headers, self._refusals = headers, {}
        refusal = self._refusals.get(error.message)
        if refusal is None:
            refusal = self._refusals[error.message] = serialised(errors.response(error), headers)
        return refusal
