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
    DecodedRequest,
    Headers,
    Resource,
    Resources,
    response_prefix,
    serialised,
    split_state,
)
from actserve.server.fastpath.endpoint import Endpoint
from actserve.server.http import error_responses as errors
from actserve.telemetry.counts import ACT, ACT_ON_VERSION, Tally
from actserve.wire.payload import MANY_BYTES, MANY_VALUES, Body, takes_long

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


class ActCodec:
    """See `Codec`. Raises an `InvalidRequest` that the route answers with."""

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
        self.endpoint = endpoint
        self._tally = tally
        self._coding, self._accept = coding, accept
        self._limit_bytes = min(MANY_BYTES, max_body_bytes)
        self._for_session = bool(session)
        self._signature = signature = endpoint.policy.signature
        self._media_type = wire.media_type_of(content_type)
        self._decode = wire.decoder(content_type, signature, values=False)
        selected = signature.select([name for name in outputs.split(",") if name])
        # The names in the answer, and their names among the results of the program.
        self._names = {name: name for name in selected}
        if not session:
            self._names |= {state.spec.name: state.output for state in signature.state}
        answered = wire.negotiate(accept, len(self._names))
        self.in_place = not coding and endpoint.arena.is_received_into and wire.is_raw(content_type, signature)
        elements = sum(spec.elements for spec in signature.answers if spec.name in self._names)
        self.max_items = min(endpoint.max_items, MANY_VALUES // max(1, elements))
        if signature.state or session:
            self.max_items = min(1, self.max_items)  # the arena has one state for each request
        action = signature.action
        discrete = action.shape == () and action.numpy_dtype.kind in "iu"
        self._action = action.name if discrete and list(self._names) == [action.name] else None
        self._answered_with = f"content-type: {answered}\r\n\r\n".encode()
        self._headers: Headers = []
        self._prefix = b""
        self._answers: dict[int, bytes] = {}  # by action, without the prefix
        self._refusals: dict[str, bytes] = {}  # by the error's message

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
        tensors, batched = payload.tensors, payload.batched
        if payload.seed is not None or payload.exploration or payload.session:
            return None
        if any(parameter.name in tensors for parameter in self._signature.parameters):
            return None
        size = payload.size
        if size > self.max_items or (batched and self.max_items == 1):
            return None
        if not self._signature.state:
            return DecodedRequest(tensors, size, batched)
        state, is_init = split_state(tensors, self._signature)
        if state is not None and self._for_session:
            return None
        return DecodedRequest(tensors, size, batched, state, is_init)

    def answer(
        self,
        outcome: BatchResult,
        start: int,
        size: int,
        decoded: DecodedRequest | None,
        headers: Headers,
        fields: bytes = b"",
    ) -> bytes:
        batched = size > 1 if decoded is None else decoded.batched
        self._tally.answered += 1
        self._renew(headers)
        if self._action is None or batched:
            end = self._build(outcome, start, size, batched)
        else:
            action = int(outcome.outputs[self._action][start])
            found = self._answers.get(action)
            end = found or self._answers.setdefault(action, self._build(outcome, start, size, batched))
        return b"%s%s%s" % (self._prefix, fields, end)

    def refusal(self, error: ActserveError, headers: Headers, decoded: DecodedRequest | None = None) -> bytes:
        if not isinstance(error, Unavailable):  # rare, and logged
            response = errors.response(error)
            self._tally.add(str(response.status_code), error.code)
            return serialised(response, headers)
        self._tally.add(UNAVAILABLE, error.code)
        self._renew(headers)
        refusal = self._refusals.get(error.message)
        if refusal is None:
            refusal = self._refusals[error.message] = serialised(errors.response(error), headers)
        return refusal

    def _renew(self, headers: Headers) -> None:
        """Note the server's headers, if they have changed; empty caches that are full."""
        if headers is not self._headers or len(self._refusals) > MAX_REFUSALS:
            self._headers, self._refusals = headers, {}
            self._prefix = response_prefix(200, headers)
        if len(self._answers) > MAX_ANSWERS:
            self._answers = {}

    def _build(self, outcome: BatchResult, start: int, size: int, batched: bool) -> bytes:
        """The response without its prefix."""
        outputs = {name: outcome.outputs[result][start : start + size] for name, result in self._names.items()}
        _, content = wire.encode(self._accept, outputs, self._signature.answers, batched)
        return b"content-length: %d\r\n%s%s" % (len(content), self._answered_with, content)
