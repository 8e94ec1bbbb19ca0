"""An infer request, from its body to the answer's."""

from __future__ import annotations

import asyncio
import gzip
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.responses import Response

from app import wire
from app.api import common
from app.api.oip import codec, metadata, sequences, statistics
from app.api.oip.schema import InferRequest
from app.errors import Unavailable
from app.policy import Acted, Policy
from app.sessions import Sessions
from app.wire.accept import quality

UNCOMPRESSED_BYTES = 1024  # less is sent as it is: it fits into one packet
_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda content: gzip.compress(content, 1, mtime=0),
    "deflate": lambda content: zlib.compress(content, 1),
}


async def answer(request: Request, policy: Policy, pinned: bool) -> Response:
    """`pinned`: the version of `policy` was asked for, and no other. Raises an `ActserveError`."""
    content = await common.read_expanded(request)
    begun_ns = time.perf_counter_ns()
    try:
        body = codec.split(content, request.headers.get(codec.HEADER))
        async with _within(body.request.parameters.timeout):
            acting, acted, selected = await _act(request, policy, pinned, body)
        acted_ns = time.perf_counter_ns()
        response = _respond(request, *_encode(body.request, acting, acted, selected))
    except BaseException:
        statistics.of(policy).fail.add(time.perf_counter_ns() - begun_ns)
        raise
    ended_ns = time.perf_counter_ns()
    statistics.of(acting).succeeded(ended_ns - begun_ns, acted, ended_ns - acted_ns)
    return response


async def _act(
    request: Request, policy: Policy, pinned: bool, body: codec.Body
) -> tuple[Policy, Acted, dict[str, bool]]:
    """Which policy acted, how, and which of its outputs to answer."""
    sessions: Sessions = request.app.state.sessions
    registry, parameters = common.registry(request), body.request.parameters
    sequence = await sequences.find(sessions, registry, parameters, policy, pinned)
    if sequence:
        selected = codec.select(body.request, sequence.policy.signature.outputs)
        return sequence.policy, await sequences.step(sessions, registry, sequence, body), selected
    selected = codec.select(body.request, metadata.outputs(policy.signature))
    tensors = codec.tensors(body, policy.signature)
    size = len(next(iter(tensors.values())))
    return policy, await policy.act(tensors, size, *sequences.randomness(parameters)), selected


def _encode(asked: InferRequest, policy: Policy, acted: Acted, selected: dict[str, bool]) -> tuple[bytes, int | None]:
    manifest = policy.artifact.manifest
    head: dict[str, Any] = {"model_name": manifest.name, "model_version": str(manifest.version)}
    if asked.id is not None:
        head["id"] = asked.id
    if acted.seed is not None:
        head["parameters"] = {"seed": acted.seed}
    return codec.join(head, {name: acted.outputs[name] for name in selected}, selected)


def _respond(request: Request, content: bytes, json_bytes: int | None) -> Response:
    headers = {} if json_bytes is None else {codec.HEADER: str(json_bytes)}
    accepted = request.headers.get("accept-encoding", "")
    if accepted and len(content) >= UNCOMPRESSED_BYTES:
        weight, coding = max((quality(accepted, known), known) for known in _COMPRESSORS)
        if weight > 0:
            content = _COMPRESSORS[coding](content)
            headers |= {"Content-Encoding": coding, "Vary": "Accept-Encoding"}
    return Response(content, headers=headers, media_type=wire.JSON if json_bytes is None else wire.RAW)


@asynccontextmanager
async def _within(timeout_us: int) -> AsyncIterator[None]:
    """Raises `Unavailable` when the block takes longer; 0 is for ever."""
    try:
        async with asyncio.timeout(timeout_us / 1e6 if timeout_us else None):
            yield
    except TimeoutError:
        raise Unavailable(f"expected an answer within the timeout of {timeout_us:,} µs; it takes longer") from None
