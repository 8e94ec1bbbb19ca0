"""Reads what several routes need from a request."""

from __future__ import annotations

from fastapi import Request
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection

from actserve import wire
from actserve.core.errors import BodyTooLarge, InvalidRequest
from actserve.core.signature import Signature
from actserve.engine.malloc import allocate
from actserve.engine.policy import Policy
from actserve.engine.registry import Registry
from actserve.server import off_loop
from actserve.server.admission import Admission, current_ticket
from actserve.server.regions import Regions
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


def regions_of(request: HTTPConnection) -> Regions:
    regions: Regions = request.app.state.regions
    return regions


def selected_outputs(query: QueryParams, signature: Signature) -> tuple[str, ...]:
    """The names of the outputs in the query; by default only the action. Raises `UnknownOutput`."""
    return signature.select([name for name in query.get("outputs", "").split(",") if name])


def read_patience_ns(request: HTTPConnection) -> int:
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


async def read_raw_body(request: Request, limit_bytes: int) -> Body:
    """The body as sent, writable, so that runtimes do not copy it. It is bounded: a declared length is refused before
    the first byte is read.
    """
    declared = request.headers.get("content-length", "")
    if not declared.isdecimal():
        return await _read_chunked(request, limit_bytes)
    if int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes, int(declared))
    body, received, held_bytes = allocate(int(declared)).data, 0, 0
    async for chunk in request.stream():
        if received + len(chunk) > held_bytes:
            held_bytes += _hold(len(chunk))
        body[received : received + len(chunk)] = chunk
        received += len(chunk)
    return body[:received]


async def _read_chunked(request: Request, limit_bytes: int) -> bytearray:
    body, held_bytes = bytearray(), 0
    async for chunk in request.stream():
        if len(body) + len(chunk) > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        if _grown_bytes(len(body) + len(chunk)) > held_bytes:
            held_bytes += _hold(_grown_bytes(len(chunk)))
        body += chunk
    return body


def _grown_bytes(size_bytes: int) -> int:
    """The memory of a bytearray that has grown to `size_bytes`: it has an eighth to spare."""
    return size_bytes * 9 // 8


def _hold(size_bytes: int) -> int:
    """Take memory for the request in progress, at least `HELD_AT_ONCE_BYTES`. Raises `MemoryFull`."""
    size_bytes = max(size_bytes, HELD_AT_ONCE_BYTES)
    ticket = current_ticket.get()
    if ticket is not None:
        ticket.hold(size_bytes)
    return size_bytes


def version_header(policy: Policy) -> dict[str, str]:
    """The header of an answer: the version that acted."""
    return {wire.VERSION_HEADER: str(policy.version)}
