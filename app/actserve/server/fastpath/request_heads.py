"""HeadParser: decides which requests take the fast path.

A head is either understood in full or left to uvicorn's parser, so the two never disagree about a head. Clients send
the same head again and again, so results are cached by the bytes of the head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from actserve.server.access.tokens import Token
from actserve.telemetry.call import is_request_id

MAX_BYTES = 4096  # of a head; longer ones go to the routes
MAX_COMPRESSED_BYTES = 1 << 15  # of a compressed body, which is buffered with its head
CACHED = 1024  # heads

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")  # visible ASCII, spaces between
_LENGTH = re.compile(rb"[1-9][0-9]{0,9}")
_PATIENCE = re.compile(rb"[1-9][0-9]{0,6}")
_BEGINNING = re.compile(rb"(?:[\x20-\x7e]*\r\n)*[\x20-\x7e]*\r?")
# Headers that change nothing about an answer: clients, browsers and proxies add them.
_IGNORED = {
    b"accept-encoding", b"accept-language", b"cache-control", b"cookie", b"forwarded", b"pragma", b"priority",
    b"user-agent", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-port", b"x-forwarded-proto",
    b"x-forwarded-server", b"x-real-ip",
}  # fmt: skip
# Trace context: W3C, then B3. It matters only if the service traces requests.
_TRACE = {
    b"traceparent", b"tracestate", b"baggage", b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid",
    b"x-b3-sampled", b"x-b3-flags",
}  # fmt: skip
_REQUEST_ID = b"x-request-id"
_RAW = b"application/octet-stream"
_ONLY: dict[bytes, set[bytes]] = {
    b"accept": {b"*/*", b"application/json"},
    b"connection": {b"keep-alive"},
}


class Target(Protocol):
    """An endpoint of the fast path."""

    @property
    def item_bytes(self) -> int:
        """The size of one observation."""

    @property
    def dtype(self) -> str:
        """Its dtype."""

    @property
    def max_items(self) -> int:
        """The largest batch that the fast path takes."""


Endpoint = TypeVar("Endpoint", bound=Target)
FindToken = Callable[[bytes | None], Token | None]  # the token in an Authorization header


@dataclass(frozen=True, slots=True)
class Observed:
    """Whether the service logs or traces requests. The routes handle such requests, because they record them."""

    requests: bool = False  # in the access log
    traces: bool = False


NOTHING_OBSERVED = Observed()


@dataclass(frozen=True, slots=True)
class RequestHead(Generic[Endpoint]):
    """The parsed head of a request that takes the fast path."""

    endpoint: Endpoint
    patience_ns: int  # how long the request may wait in the queue; 0 is no limit
    body_bytes: int
    items: int  # in the body; 0: the body is compressed, and has one item
    token: Token | None = None
    request_id: bytes | None = None  # returned in the answer


def may_become_a_head(data: bytes) -> bool:
    """Whether `data` can be the beginning of a head for the fast path; if not, uvicorn's parser gets it at once."""
    return len(data) < MAX_BYTES and data.startswith(b"POST "[: len(data)]) and bool(_BEGINNING.fullmatch(data))


class HeadParser(Generic[Endpoint]):
    """Parses heads of POST requests to `endpoints`, by path.

    `fits(body_bytes, items)` says whether a body is within the service's limits. With `find_token`, a request needs a
    valid token.
    """

    def __init__(
        self,
        endpoints: Mapping[bytes, Endpoint],
        fits: Callable[[int, int], bool] = lambda _body_bytes, _items: True,
        find_token: FindToken | None = None,
        observed: Observed = NOTHING_OBSERVED,
    ) -> None:
        self._endpoints, self._fits, self._find_token, self._observed = endpoints, fits, find_token, observed
        self._cache: dict[bytes, RequestHead[Endpoint] | None] = {}

    def find(self, head: bytes) -> RequestHead[Endpoint] | None:
        """Parse `head`, which ends with an empty line. None: the routes handle the request."""
        try:
            return self._cache[head]
        except KeyError:
            found, cacheable = self._parse(head)
            if cacheable:
                if len(self._cache) >= CACHED:
                    self._cache.clear()
                self._cache[head] = found
            return found

    def _parse(self, head: bytes) -> tuple[RequestHead[Endpoint] | None, bool]:
        """(the parsed head or None, whether the result may be cached for requests with the same head)."""
        request, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        method, _, rest = request.partition(b" ")
        path, _, version = rest.partition(b" ")
        if (method, version) != (b"POST", b"HTTP/1.1") or path not in self._endpoints:
            return None, True
        fields: dict[bytes, bytes] = {}
        cacheable = True
        for line in lines:
            name, colon, value = line.partition(b":")
            value = value.lstrip(b" ")  # uvicorn's parser keeps trailing spaces, so `_VALUE` refuses them
            name = name.lower()
            if not (colon and _TOKEN.fullmatch(name) and _VALUE.fullmatch(value)):
                return None, True
            if name in _TRACE:
                cacheable = False
                if self._observed.traces:
                    return None, False
            elif name not in _IGNORED:
                if name in fields:
                    return None, True
                fields[name] = value
        request_id = fields.pop(_REQUEST_ID, None)
        if request_id is not None:
            cacheable = False
            if self._observed.requests or self._observed.traces or not is_request_id(request_id.decode("ascii")):
                return None, False
        return self._read_fields(path, fields, request_id), cacheable

    def _read_fields(
        self, path: bytes, fields: dict[bytes, bytes], request_id: bytes | None
    ) -> RequestHead[Endpoint] | None:
        length, content_type = fields.pop(b"content-length", b""), fields.pop(b"content-type", None)
        if content_type is None or fields.pop(b"host", None) is None or not _LENGTH.fullmatch(length):
            return None
        coding, patience = fields.pop(b"content-encoding", None), fields.pop(b"x-deadline-ms", None)
        if patience is not None and not _PATIENCE.fullmatch(patience):
            return None
        token, authorization = None, fields.pop(b"authorization", None)
        if self._find_token is not None:
            token = self._find_token(authorization)
            if token is None:
                return None
        if any(value not in _ONLY.get(name, ()) for name, value in fields.items()):
            return None
        endpoint, body_bytes = self._endpoints[path], int(length)
        if content_type not in (_RAW, b"%s; dtype=%s" % (_RAW, endpoint.dtype.encode())):
            return None
        items, remainder = divmod(body_bytes, endpoint.item_bytes)
        if coding is not None:
            if coding != b"zstd" or body_bytes > MAX_COMPRESSED_BYTES:
                return None
            items, expanded_bytes = 0, endpoint.item_bytes
        elif remainder or not 0 < items <= endpoint.max_items:
            return None
        else:
            expanded_bytes = body_bytes
        if not self._fits(max(body_bytes, expanded_bytes), max(1, items)):
            return None
        return RequestHead(endpoint, int(patience or 0) * 1_000_000, body_bytes, items, token, request_id)
