"""An infer request over HTTP, from its body to the answer's."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from typing import Any

from fastapi import Request
from starlette.responses import Response

from app import wire
from app.api import common
from app.api.oip import codec
from app.api.oip.infer import Answer, answer
from app.policy import Policy
from app.wire.accept import quality
from app.wire.oip import HEADER

UNCOMPRESSED_BYTES = 1024  # less is sent as it is: it fits into one packet
_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda content: gzip.compress(content, 1, mtime=0),
    "deflate": lambda content: zlib.compress(content, 1),
}


async def infer(request: Request, policy: Policy, pinned: bool) -> Response:
    """`pinned`: the version of `policy` was asked for, and no other. Raises an `ActserveError`."""
    content = await common.read_expanded(request)
    return await answer(
        request.app.state.sessions,
        common.registry(request),
        policy,
        pinned,
        lambda: codec.split(content, request.headers.get(HEADER)),
        lambda answered: _respond(request, *_encode(answered)),
    )


def _encode(answered: Answer) -> tuple[bytes, int | None]:
    head: dict[str, Any] = {"model_name": answered.model_name, "model_version": answered.model_version}
    if answered.id is not None:
        head["id"] = answered.id
    if answered.seed is not None:
        head["parameters"] = {"seed": answered.seed}
    return codec.join(head, answered.outputs, answered.binary)


def _respond(request: Request, content: bytes, json_bytes: int | None) -> Response:
    headers = {} if json_bytes is None else {HEADER: str(json_bytes)}
    accepted = request.headers.get("accept-encoding", "")
    if accepted and len(content) >= UNCOMPRESSED_BYTES:
        weight, coding = max((quality(accepted, known), known) for known in _COMPRESSORS)
        if weight > 0:
            content = _COMPRESSORS[coding](content)
            headers |= {"Content-Encoding": coding, "Vary": "Accept-Encoding"}
    return Response(content, headers=headers, media_type=wire.JSON if json_bytes is None else wire.RAW)
