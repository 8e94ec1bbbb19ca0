"""HeadParser: decides which requests take the fast path.

A head is either understood in full or left to uvicorn's parser, so the two never disagree about a head. Clients send
the same head again and again, so results are cached by the bytes of the head, without the headers that have another
value each time. The head of a session's steps is the same each time if it has no number of the step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actserve.core.errors import InvalidRequest
from actserve.engine.recorders import Feedback
from actserve.server.access.tokens import Token
from actserve.server.fastpath.codec import Codec, Resources
from actserve.server.sessions.feedback import read_feedback
from actserve.telemetry.call import is_request_id

MAX_BYTES = 4096  # of a head; longer ones go to the routes
CACHED = 4096  # heads

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")  # visible ASCII, spaces between
_LENGTH = re.compile(rb"[1-9][0-9]{0,9}")
_PATIENCE = re.compile(rb"[1-9][0-9]{0,6}")
_BEGINNING = re.compile(rb"(?:[\x20-\x7e]*\r\n)*[\x20-\x7e]*\r?")
_NUMBER = re.compile(rb"[1-9][0-9]{0,17}")
# Headers that change nothing about an answer: clients, browsers and proxies add them.
_IGNORED = {
    b"accept-language", b"cache-control", b"cookie", b"forwarded", b"pragma", b"priority", b"user-agent", b"via",
    b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-port", b"x-forwarded-proto", b"x-forwarded-server",
    b"x-real-ip",
}  # fmt: skip
# Trace context: W3C, then B3. It matters only if the service traces requests.
_TRACE = {
    b"traceparent", b"tracestate", b"baggage", b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid",
    b"x-b3-sampled", b"x-b3-flags",
}  # fmt: skip
_ACCEPT_ENCODING = b"accept-encoding"
_REQUEST_ID, _SESSION, _STEP = b"x-request-id", b"x-session", b"x-step"
_REWARD, _DONE = b"x-reward", b"x-done"
_OF_SESSION = {_STEP, _REWARD, _DONE}
# Headers with another value in each request. A head is cached without them.
_VARYING = re.compile(
    rb"\r\n(x-request-id|x-session|x-step|x-reward|x-done|traceparent|x-b3-traceid|x-b3-spanid): *([^\r\n]*)(?=\r\n)",
    re.IGNORECASE,
)


FindToken = Callable[[bytes | None], Token | None]  # the token in an Authorization header


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The parsed head of a request that takes the fast path."""

    codec: Codec
    patience_ns: int  # how long the request may wait in the queue; 0 is no limit
    body_bytes: int
    items: int  # in a body that is received in place; 0: the codec reads the body
    token: Token | None = None
    request_id: bytes | None = None  # returned in the answer
    session: str | None = None  # the id of the session that takes a step
    step: int | None = None  # its number; None: the next one
    previous: Feedback | None = None  # of the step before, as the client tells it


def may_become_a_head(data: bytes) -> bool:
    """Whether `data` can be the beginning of a head for the fast path; if not, uvicorn's parser gets it at once."""
    return len(data) < MAX_BYTES and data.startswith(b"POST "[: len(data)]) and bool(_BEGINNING.fullmatch(data))


class HeadParser:
    """Parses heads of POST requests to `resources`, by path.

    `fits(body_bytes, items)` says whether a body is within the service's limits. With `find_token`, a request needs a
    valid token. `traced`: the service traces requests, and those with an id or a trace context go to the routes.
    """

    def __init__(
        self,
        resources: Resources,
        fits: Callable[[int, int], bool] = lambda _body_bytes, _items: True,
        find_token: FindToken | None = None,
        traced: bool = False,
    ) -> None:
        self._resources, self._fits, self._find_token, self._traced = resources, fits, find_token, traced
        self._cache: dict[bytes | tuple[bytes, ...], RequestHead | None] = {}

    def find(self, head: bytes) -> RequestHead | None:
        """Parse `head`, which ends with an empty line. None: the routes handle the request."""
        try:
            return self._cache[head]
        except KeyError:
            constant, *varying = _VARYING.split(head)
        if not varying:
            return self._cached(head, head)
        names, values = [name.lower() for name in varying[::3]], varying[1::3]
        constant = b"".join([constant, *varying[2::3]])
        found = self._cached((constant, *names), constant, names)
        completed = found and self._with(found, names, values)
        if completed is not None and names == [_SESSION]:
            self._remember(head, completed)
        return completed

    def _cached(self, key: bytes | tuple[bytes, ...], head: bytes, varying: Sequence[bytes] = ()) -> RequestHead | None:
        """The parsed `head`, from which the headers `varying` were removed."""
        if key not in self._cache:
            once = all(varying.count(name) <= 1 for name in (_REQUEST_ID, _SESSION, *_OF_SESSION))
            of_session = _SESSION in varying or not _OF_SESSION.intersection(varying)
            self._remember(key, self._parse(head, _SESSION in varying) if once and of_session else None)
        return self._cache[key]

    def _remember(self, key: bytes | tuple[bytes, ...], found: RequestHead | None) -> None:
        if len(self._cache) >= CACHED:
            self._cache.clear()
        self._cache[key] = found

    def _with(self, head: RequestHead, names: Sequence[bytes], values: Sequence[bytes]) -> RequestHead | None:
        """`head` with the headers that have another value in each request."""
        if any(_VALUE.fullmatch(value) is None for value in values):
            return None
        if self._traced and any(name in _TRACE or name == _REQUEST_ID for name in names):
            return None
        varying = dict(zip(names, values, strict=True))
        request_id, session, step = varying.get(_REQUEST_ID), varying.get(_SESSION), varying.get(_STEP)
        if request_id is not None and not is_request_id(request_id.decode("ascii")):
            return None
        if step is not None and _NUMBER.fullmatch(step) is None:
            return None
        try:
            previous = read_feedback(
                *(varying[name].decode("ascii") if name in varying else None for name in (_REWARD, _DONE))
            )
        except InvalidRequest:  # the route says so
            return None
        return RequestHead(
            head.codec, head.patience_ns, head.body_bytes, head.items, head.token,
            request_id,
            None if session is None else session.decode("ascii"),
            None if step is None else int(step),
            previous,
        )  # fmt: skip

    def _parse(self, head: bytes, has_session: bool) -> RequestHead | None:
        request, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        method, _, rest = request.partition(b" ")
        target, _, version = rest.partition(b" ")
        path, mark, query = target.partition(b"?")
        if (method, version) != (b"POST", b"HTTP/1.1") or path not in self._resources or (mark and not query):
            return None
        fields: dict[bytes, bytes] = {_SESSION: b""} if has_session else {}
        for line in lines:
            name, colon, value = line.partition(b":")
            value = value.lstrip(b" ")  # uvicorn's parser keeps trailing spaces, so `_VALUE` refuses them
            name = name.lower()
            if not (colon and _TOKEN.fullmatch(name) and _VALUE.fullmatch(value)):
                return None
            if name in _TRACE:
                if self._traced:
                    return None
            elif name not in _IGNORED:
                if name in fields and name != _ACCEPT_ENCODING:
                    return None
                fields[name] = b"%s, %s" % (fields[name], value) if name in fields else value
        return self._read_fields(path, query, fields)

    def _read_fields(self, path: bytes, query: bytes, fields: dict[bytes, bytes]) -> RequestHead | None:
        length, patience = fields.pop(b"content-length", b""), fields.pop(b"x-deadline-ms", None)
        if fields.pop(b"host", None) is None or not _LENGTH.fullmatch(length):
            return None
        if patience is not None and not _PATIENCE.fullmatch(patience):
            return None
        token, authorization = None, fields.pop(b"authorization", None)
        if self._find_token is not None:
            token = self._find_token(authorization)
            if token is None:
                return None
        if fields.pop(b"connection", b"keep-alive") != b"keep-alive":
            return None
        codec = self._resources[path].codec(fields, query)
        fields.pop(_SESSION, None)
        fields.pop(_ACCEPT_ENCODING, None)
        if codec is None or fields:
            return None
        body_bytes, items = int(length), 0
        if codec.in_place:
            items, remainder = divmod(body_bytes, codec.endpoint.item_bytes)
            if remainder or not 0 < items <= codec.max_items:
                return None
        if not self._fits(body_bytes, max(1, items)):
            return None
        return RequestHead(codec, int(patience or 0) * 1_000_000, body_bytes, items, token)
