"""Reads what several routes need from a request."""

from __future__ import annotations

from fastapi import Request
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection

from actserve import wire
from actserve.core.errors import BodyTooLarge, InvalidRequest
from actserve.core.signature import Signature
from actserve.engine.registry import Registry
from actserve.server import off_loop
from actserve.server.admission import Admission, current_ticket
from actserve.server.sessions import Sessions
from actserve.wire.payload import Body

HELD_AT_ONCE_BYTES = 64 << 10  # of a body that grows
DEADLINE_HEADER = "X-Deadline-Ms"


def admission_of(request: HTTPConnection) -> Admission:
    admission: Admission = request.app.state.admission
    return admission


def registry_of(request: HTTPConnection) -> Registry:
    registry: Registry = request.app.state.registry
    return registry


def sessions_of(request: HTTPConnection) -> Sessions:
    sessions: Sessions = request.app.state.sessions
    return sessions


def selected_outputs(query: QueryParams, signature: Signature) -> tuple[str, ...]:
    """The names of the outputs in the query; by default only the action. Raises `UnknownOutput`."""
    return signature.select([name for name in query.get("outputs", "").split(",") if name])


def read_patience_ns(request: Request) -> int:
    """How long the request may wait in the queue; 0 is no limit. Raises `InvalidRequest`."""
    value = request.headers.get(DEADLINE_HEADER)
    if value is None:
        return 0
    if not (value.isascii() and value.isdecimal() and len(value) < 8 and int(value)):
        raise InvalidRequest(f"expected {DEADLINE_HEADER} as a whole number from 1 to 9999999; got {value[:80]!r}")
    return int(value) * 1_000_000


async def read_body(request: Request) -> Body:
    """The decompressed body, bounded before and after decompression: a kilobyte can expand to gigabytes."""
    limit_bytes = admission_of(request).max_body_bytes
    body = await read_raw_body(request, limit_bytes)
    encoding = ", ".join(request.headers.getlist("content-encoding"))
    if not encoding:
        return body
    expanded = await off_loop.call(wire.expand, body, encoding, limit_bytes, takes_long=True)
    _hold(len(expanded))
    return expanded


async def read_raw_body(request: Request, limit_bytes: int) -> bytearray:
    """The body as sent, bounded: a declared length is refused before the first byte is read."""
    held_bytes = 0
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes, int(declared))
    body = bytearray()  # writable, so that runtimes do not copy it
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        if len(body) > held_bytes:
            more_bytes = max(HELD_AT_ONCE_BYTES, len(chunk))
            _hold(more_bytes)
            held_bytes += more_bytes
    return body


def _hold(size_bytes: int) -> None:
    """Take memory for the request in progress. Raises `MemoryFull`."""
    ticket = current_ticket.get()
    if ticket is not None:
        ticket.hold(size_bytes)
