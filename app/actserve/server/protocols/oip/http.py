"""An infer request over HTTP, from its body to the answer's.

A body is JSON. A tensor's data is in it, or follows it, one tensor after the other, row-major and little-endian (the
binary tensor data extension): then `Inference-Header-Content-Length` says where the JSON ends, and each such tensor
gives its `binary_data_size`.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic_core
from fastapi import Request
from starlette.responses import Response

from actserve import wire
from actserve.core.errors import InvalidTensor, MalformedBody
from actserve.core.signature import Array, Arrays, Signature, TensorSpec
from actserve.engine.policy import Policy
from actserve.server.http.requests import admission_of, read_body, registry_of
from actserve.server.protocols.oip import codec, schema
from actserve.server.protocols.oip.infer import InferResponse, answer
from actserve.wire.accept_header import quality
from actserve.wire.oip import DATATYPES, HEADER
from actserve.wire.payload import Body

UNCOMPRESSED_BYTES = 1024  # less is sent as it is: it fits into one packet
_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda content: gzip.compress(content, 1, mtime=0),
    "deflate": lambda content: zlib.compress(content, 1),
}


async def infer(request: Request, policy: Policy, pinned: bool) -> Response:
    """`pinned`: the version of `policy` was asked for, and no other. Raises an `ActserveError`."""
    content = await read_body(request)
    return await answer(
        admission_of(request),
        request.app.state.sessions,
        registry_of(request),
        policy,
        pinned,
        lambda: split(content, request.headers.get(HEADER)),
        lambda answered: _respond(request, *written(answered)),
    )


@dataclass(frozen=True)
class HttpInferRequest:
    """An infer request, taken apart: the JSON, and what follows it."""

    request: schema.InferRequest
    binary: memoryview

    def tensors(self, signature: Signature) -> Arrays:
        """The inputs, a valid request: each (B, *shape). Raises `InvalidTensor` or `MalformedBody`."""
        found: Arrays = {}
        rest = self.binary
        for given, spec in codec.matched(self.request.inputs, signature):
            size = given.parameters.binary_data_size if given.parameters else None
            if (size is None) == (given.data is None):
                got = "neither" if size is None else "both"
                raise InvalidTensor(spec.name, "either data or binary_data_size", got)
            if size is None:
                found[spec.name] = codec.from_values(given.data, given.shape, spec)
            else:
                found[spec.name] = _from_binary(rest[:size], size, given.shape, spec)
                rest = rest[size:]
        if rest:
            came = len(self.binary)
            raise MalformedBody(f"expected {came - len(rest):,} bytes after the JSON; got {came:,}")
        signature.validate_request(found)
        return found


def split(content: Body, json_bytes: str | None) -> HttpInferRequest:
    """`json_bytes` is the value of `HEADER`, if there is one. Raises `MalformedBody`."""
    body = memoryview(content)
    if json_bytes is None:
        return HttpInferRequest(schema.parse(bytes(body)), body[:0])
    if not (json_bytes.isascii() and json_bytes.isdecimal() and len(json_bytes) < 19 and int(json_bytes) <= len(body)):
        raise MalformedBody(f"expected {HEADER} of 0 to {len(body)}, the body's length; got {json_bytes[:80]!r}")
    end = int(json_bytes)
    return HttpInferRequest(schema.parse(bytes(body[:end])), body[end:])


def written(answer: InferResponse) -> tuple[bytes, int | None]:
    """The body and, if there is binary data in it, how many bytes of it are JSON."""
    document: dict[str, Any] = {"model_name": answer.model_name, "model_version": answer.model_version}
    if answer.id is not None:
        document["id"] = answer.id
    if answer.seed is not None:
        document["parameters"] = {"seed": answer.seed}
    document["outputs"] = described = []
    parts: list[bytes] = []
    for name, array in answer.outputs.items():
        tensor: dict[str, Any] = {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": array.shape}
        if answer.binary[name]:
            parts.append(codec.to_bytes(array))
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        described.append(tensor)
    json = pydantic_core.to_json(document, inf_nan_mode="strings")
    return (b"".join([json, *parts]), len(json)) if parts else (json, None)


def _respond(request: Request, content: bytes, json_bytes: int | None) -> Response:
    headers = {} if json_bytes is None else {HEADER: str(json_bytes)}
    accepted = request.headers.get("accept-encoding", "")
    if accepted and len(content) >= UNCOMPRESSED_BYTES:
        weight, coding = max((quality(accepted, known), known) for known in _COMPRESSORS)
        if weight > 0:
            content = _COMPRESSORS[coding](content)
            headers |= {"Content-Encoding": coding, "Vary": "Accept-Encoding"}
    return Response(content, headers=headers, media_type=wire.JSON if json_bytes is None else wire.RAW)


def _from_binary(data: memoryview, declared: int, shape: Sequence[int], spec: TensorSpec) -> Array:
    size = codec.size_bytes(shape, spec)
    if declared != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes for shape {shape}", f"a binary_data_size of {declared:,}")
    if len(data) != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes after the JSON", f"the last {len(data):,}")
    return np.require(codec.from_bytes(data, shape, spec), requirements="A")  # JSON of any length is before it
