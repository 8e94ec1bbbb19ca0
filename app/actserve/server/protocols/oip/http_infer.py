"""An infer request over HTTP: decodes the body, and encodes the response.

A body is JSON. The data of a tensor is in the JSON, or follows it in row-major, little-endian bytes (the binary tensor
data extension). Then `Inference-Header-Content-Length` is the length of the JSON, and each such tensor has a
`binary_data_size`.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pydantic_core
from fastapi import Request
from starlette.responses import Response

from actserve import wire
from actserve.core.errors import InvalidRequest, InvalidTensor, MalformedBody
from actserve.core.signature import Array, Arrays, Signature, TensorSpec
from actserve.engine.policy import Policy
from actserve.server.admission import current_token
from actserve.server.http.requests import admission_of, read_body, regions_of, registry_of, sessions_of
from actserve.server.protocols.oip import codec
from actserve.server.protocols.oip.infer import InferResponse, handle_infer
from actserve.server.protocols.oip.infer_request import InferRequest, InputParameters, OutputParameters, parse_json
from actserve.server.regions import OpenRegion, owner_of
from actserve.wire import large_json
from actserve.wire.accept_header import quality
from actserve.wire.oip import DATATYPES, HEADER
from actserve.wire.payload import Body, takes_long

FindRegion = Callable[[str], OpenRegion]  # raises InvalidRequest
MIN_COMPRESSED_BYTES = 1024  # smaller responses fit into one packet
_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda content: gzip.compress(content, 1, mtime=0),
    "deflate": lambda content: zlib.compress(content, 1),
}


async def infer(request: Request, policy: Policy, pinned: bool) -> Response:
    """`pinned`: the client asked for this version of `policy`. Raises an `ActserveError`."""
    content = await read_body(request)
    find_region = partial(regions_of(request).find, owner_of(current_token()))
    return await handle_infer(
        admission_of(request),
        sessions_of(request),
        registry_of(request),
        policy,
        pinned,
        lambda: read(content, request.headers.get(HEADER), find_region),
        lambda response: respond(*encode(response, find_region), request.headers.get("accept-encoding", "")),
        takes_long=takes_long(wire.JSON, content),
    )


@dataclass(frozen=True)
class HttpInferRequest:
    """The JSON of an infer request, the bytes that follow it, and the regions of shared memory that it may name."""

    request: InferRequest
    binary: memoryview
    find_region: FindRegion
    allocate: Callable[[int], Array] = lambda size_bytes: np.empty(size_bytes, np.uint8)  # for bytes of a region

    def tensors(self, signature: Signature) -> Arrays:
        """The inputs, a valid request: each (B, *shape). Raises `InvalidTensor` or `MalformedBody`."""
        found: Arrays = {}
        rest = self.binary
        for given, spec in codec.match_inputs(self.request.inputs, signature):
            size = given.parameters.binary_data_size if given.parameters else None
            if given.parameters and given.parameters.shared_memory_region is not None:
                if given.data is not None or size is not None:
                    raise InvalidTensor(spec.name, "data in one place", "some in shared memory and some in the body")
                found[spec.name] = self._from_region(given.parameters, given.shape, spec)
                continue
            if (size is None) == (given.data is None):
                got = "neither" if size is None else "both"
                raise InvalidTensor(spec.name, "either data or binary_data_size", got)
            if size is None:
                found[spec.name] = codec.from_values(given.data, given.shape, spec)
            else:
                found[spec.name] = _from_binary(rest[:size], size, given.shape, spec)
                rest = rest[size:]
        if rest:
            got_bytes = len(self.binary)
            raise MalformedBody(f"expected {got_bytes - len(rest):,} bytes after the JSON; got {got_bytes:,}")
        signature.validate_request(found)
        return found

    def _from_region(self, parameters: InputParameters, shape: Sequence[int], spec: TensorSpec) -> Array:
        assert parameters.shared_memory_region is not None
        size, declared = codec.size_bytes(shape, spec), parameters.shared_memory_byte_size
        if declared != size:
            got = f"a shared_memory_byte_size of {declared}"
            raise InvalidTensor(spec.name, f"{size:,} bytes for shape {shape}", got)
        region = self.find_region(parameters.shared_memory_region)
        region.check(parameters.shared_memory_offset, size)
        data = self.allocate(size)
        region.read(parameters.shared_memory_offset, data)
        return codec.from_bytes(data.data, shape, spec)


def read(body: Body, json_bytes: str | None, find_region: FindRegion) -> HttpInferRequest:
    """`json_bytes` is the value of the header `HEADER`, if any. Raises `MalformedBody`."""
    content, binary = split(body, json_bytes)
    return HttpInferRequest(parse_json(content), binary, find_region)


def split(body: Body, json_bytes: str | None) -> tuple[bytes, memoryview]:
    """The JSON, and the bytes that follow it. Raises `MalformedBody`."""
    view = memoryview(body)
    if json_bytes is None:
        return bytes(view), view[:0]
    if not (json_bytes.isascii() and json_bytes.isdecimal() and len(json_bytes) < 19 and int(json_bytes) <= len(view)):
        raise MalformedBody(f"expected {HEADER} of 0 to {len(view)}, the body's length; got {json_bytes[:80]!r}")
    end = int(json_bytes)
    return bytes(view[:end]), view[end:]


def encode(response: InferResponse, find_region: FindRegion) -> tuple[bytes, int | None]:
    """The body and, if it has binary data, the length of its JSON. Writes outputs that go to shared memory.

    Raises `InvalidRequest` if a region is unknown or too small.
    """
    document: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id is not None:
        document["id"] = response.id
    if response.seed is not None:
        document["parameters"] = {"seed": response.seed}
    described: list[bytes] = []
    parts: list[bytes] = []
    for name, array in response.outputs.items():
        spec = response.specs[name]
        tensor: dict[str, Any] = {"name": name, "datatype": DATATYPES[spec.dtype], "shape": array.shape}
        if name in response.placed:
            tensor["parameters"] = _place(response.placed[name], name, spec.to_wire(array).tobytes(), find_region)
            described.append(pydantic_core.to_json(tensor))
        elif response.binary[name]:
            parts.append(spec.to_wire(array).tobytes())
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
            described.append(pydantic_core.to_json(tensor))
        else:
            described.append(pydantic_core.to_json(tensor)[:-1] + b',"data":' + large_json.dump(array.ravel()) + b"}")
    json = pydantic_core.to_json(document)[:-1] + b',"outputs":[' + b",".join(described) + b"]}"
    return (b"".join([json, *parts]), len(json)) if parts else (json, None)


def _place(parameters: OutputParameters, name: str, data: bytes, find_region: FindRegion) -> dict[str, Any]:
    """Write an output to a region; returns its parameters in the response."""
    region, limit = parameters.shared_memory_region, parameters.shared_memory_byte_size
    assert region is not None
    if limit is None or len(data) > limit:
        got = f"a shared_memory_byte_size of {limit}"
        raise InvalidRequest(f"{name}: expected at least {len(data):,} bytes of shared memory; got {got}")
    find_region(region).write(parameters.shared_memory_offset, data)
    return {
        "shared_memory_region": region,
        "shared_memory_offset": parameters.shared_memory_offset,
        "shared_memory_byte_size": len(data),
    }


def respond(content: bytes, json_bytes: int | None, accepted: str) -> Response:
    """The response with a body from `encode`, compressed if that is `accepted` and worthwhile."""
    headers = {} if json_bytes is None else {HEADER: str(json_bytes)}
    if accepted and len(content) >= MIN_COMPRESSED_BYTES:
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
    return np.require(
        codec.from_bytes(data, shape, spec), requirements="A"
    )  # aligned: the JSON before it has any length
