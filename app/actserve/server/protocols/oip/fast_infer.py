"""Infer requests over HTTP on the fast path.

Those with a timeout, seed or exploration go to the routes, and so do the first and the last request of a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from actserve.core.errors import ActserveError
from actserve.core.signature import Array
from actserve.engine.batch import BatchResult
from actserve.engine.policy import Acted
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
from actserve.server.protocols import Service
from actserve.server.protocols.oip import codec, error_responses, http_infer, statistics
from actserve.server.protocols.oip.infer import InferResponse
from actserve.server.protocols.oip.infer_request import InferRequest, OutputParameters, Parameters, parse_json
from actserve.server.regions import Regions, owner_of
from actserve.telemetry.counts import Tally
from actserve.wire import JSON
from actserve.wire.oip import HEADER
from actserve.wire.payload import MANY_BYTES, Body, takes_long

INFER = "/v2/models/{name}/infer"
INFER_ON_VERSION = "/v2/models/{name}/versions/{version}/infer"
MAX_DOCUMENTS = 256  # cached
MAX_DOCUMENT_BYTES = 4096  # of a cached one
_DEFAULT = Parameters()
_ANY = {"binary_data_output": False, "priority": 0, "sequence_id": 0}  # parameters with any value, and their defaults


def infer_resources(endpoint: Endpoint, service: Service) -> Resources:
    """The resources of infer requests for the policy of `endpoint`. They may name regions of shared memory."""
    policy = endpoint.policy
    found: dict[bytes, Resource] = {}
    for route in (INFER, INFER_ON_VERSION):
        tally = service.registry.counts.tally(policy.name, "fastpath", route)
        path = route.format(name=policy.name, version=policy.version).encode()
        found[path] = InferResource(endpoint, tally, service.regions)
    return found


class InferResource:
    """The infer requests to one policy."""

    def __init__(self, endpoint: Endpoint, tally: Tally, regions: Regions) -> None:
        self._endpoint, self._tally, self._regions = endpoint, tally, regions
        self._codecs: dict[tuple[str | None, str], InferCodec] = {}

    def codec(self, fields: dict[bytes, bytes], query: bytes) -> InferCodec | None:
        """The headers `Content-Type` and `Accept` have no meaning here."""
        if query or b"content-encoding" in fields or b"x-session" in fields:
            return None
        for name in (b"content-type", b"accept"):
            fields.pop(name, None)
        json_bytes = fields.pop(HEADER.lower().encode(), None)
        accepted = fields.pop(b"accept-encoding", b"").decode("ascii")
        key = (None if json_bytes is None else json_bytes.decode("ascii"), accepted)
        if key not in self._codecs:
            if len(self._codecs) >= MAX_DOCUMENTS:
                self._codecs.clear()
            self._codecs[key] = InferCodec(self._endpoint, self._tally, self._regions, *key)
        codec = self._codecs[key]
        return codec if codec.max_items else None


@dataclass(frozen=True, slots=True)
class Document:
    """The JSON of a request."""

    request: InferRequest
    selected: Mapping[str, bool]  # the outputs to return, and whether each is sent as binary
    placed: Mapping[str, OutputParameters]  # outputs in shared memory


@dataclass(slots=True)
class DecodedInferRequest(DecodedRequest):
    document: Document | None = None
    begun_ns: int = 0
    find_region: http_infer.FindRegion | None = None


class InferCodec(Codec):
    """Infer requests. `json_bytes` and `accepted` are values of headers."""

    def __init__(
        self, endpoint: Endpoint, tally: Tally, regions: Regions, json_bytes: str | None, accepted: str
    ) -> None:
        self._specs = {spec.name: spec for spec in endpoint.policy.signature.answers}
        super().__init__(endpoint, tally, list(self._specs), single=False)
        self._regions, self._json_bytes, self._accepted = regions, json_bytes, accepted
        self._documents: dict[bytes, Document | None] = {}

    def read(self, body: Body, token: Token | None) -> DecodedInferRequest | None:
        begun_ns = time.perf_counter_ns()
        try:
            content, binary = http_infer.split(body, self._json_bytes)
            if len(body) > MANY_BYTES or takes_long(JSON, content):
                return None
            document = self._document(content)
            if document is None:
                return None
            find_region = partial(self._regions.find, owner_of(token))
            lent: list[Array] = []
            request = http_infer.HttpInferRequest(document.request, binary, find_region, partial(self._lend, lent))
            tensors = request.tensors(self._signature)
        except ActserveError:
            return None
        size = len(next(iter(tensors.values())))
        if not self._takes(tensors, size):
            return None
        sequence = document.request.parameters.sequence_id or None
        state, is_init = split_state(tensors, self._signature)
        if sequence is not None and (state is not None or size > 1):
            return None
        return DecodedInferRequest(tensors, size, True, state, is_init, lent, sequence, document, begun_ns, find_region)

    def _lend(self, lent: list[Array], size_bytes: int) -> Array:
        """Memory for the bytes of a region; spare memory for observations, which is taken back later."""
        arena, (items, rest) = self.endpoint.arena, divmod(size_bytes, self.endpoint.item_bytes)
        if not arena.is_received_into or rest or not items:
            return np.empty(size_bytes, np.uint8)
        lent.append(arena.lend(items))
        return lent[-1]

    def _write(self, outcome: BatchResult, start: int, size: int, decoded: DecodedRequest | None) -> bytes:
        assert isinstance(decoded, DecodedInferRequest)
        assert decoded.document is not None
        assert decoded.find_region is not None
        acted_ns = time.perf_counter_ns()
        policy, document = self.endpoint.policy, decoded.document
        outputs = {name: outcome.outputs[self._results[name]][start : start + size] for name in document.selected}
        described = InferResponse(
            policy.name, str(policy.version), document.request.id, None, outputs, self._specs,
            document.selected, document.placed,
        )  # fmt: skip
        response = http_infer.respond(*http_infer.encode(described, decoded.find_region), self._accepted)
        ended_ns = time.perf_counter_ns()
        acted = Acted({}, None, outcome.begun_ns - decoded.begun_ns, outcome.run_ns)
        statistics.counters_of(policy).succeeded(ended_ns - decoded.begun_ns, acted, ended_ns - acted_ns)
        fields = b"".join(b"%s: %s\r\n" % field for field in response.raw_headers)
        return b"".join([fields, b"\r\n", response.body])

    def refusal(self, error: ActserveError, headers: Headers, decoded: DecodedRequest | None = None) -> bytes:
        begun_ns = decoded.begun_ns if isinstance(decoded, DecodedInferRequest) else time.perf_counter_ns()
        statistics.counters_of(self.endpoint.policy).fail.add(time.perf_counter_ns() - begun_ns)
        response = error_responses.response(error)
        self._tally.add(str(response.status_code), error.code)
        return serialised(response, headers)

    def _document(self, content: bytes) -> Document | None:
        """The parsed JSON; None for requests of the routes. Clients send the same document with each request."""
        if content in self._documents:
            return self._documents[content]
        request = parse_json(content)
        document = None
        of_sequence = bool(request.parameters.sequence_id)
        if request.parameters.model_copy(update=_ANY) == _DEFAULT:
            specs = self._signature.outputs if of_sequence else self._signature.answers
            selected = codec.select_outputs(request, specs)
            document = Document(request, selected, codec.placed_outputs(request))
        if len(content) <= MAX_DOCUMENT_BYTES:
            if len(self._documents) >= MAX_DOCUMENTS:
                self._documents.clear()
            self._documents[content] = document
        return document
