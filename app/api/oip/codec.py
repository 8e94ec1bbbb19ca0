"""Infer bodies <-> named arrays: what HTTP and gRPC share, and the bodies of HTTP.

A body of HTTP is JSON. A tensor's data is in it, or follows it, one tensor after the other, row-major and
little-endian (the binary tensor data extension): then `Inference-Header-Content-Length` says where the JSON ends, and
each such tensor gives its `binary_data_size`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic_core

from app.api.oip import schema
from app.errors import InvalidRequest, InvalidTensor, MalformedBody, UnknownOutput
from app.signature import Array, Arrays, Signature, TensorSpec
from app.wire import items
from app.wire.as_json import from_lists
from app.wire.oip import DATATYPES as DATATYPES
from app.wire.oip import HEADER as HEADER


@dataclass(frozen=True)
class Body:
    """A request of HTTP, taken apart: the JSON, and what follows it."""

    request: schema.InferRequest
    binary: memoryview

    def tensors(self, signature: Signature) -> Arrays:
        """The inputs, a valid request: each (B, *shape). Raises `InvalidTensor` or `MalformedBody`."""
        found: Arrays = {}
        rest = self.binary
        for given, spec in matched(self.request.inputs, signature):
            size = given.parameters.binary_data_size if given.parameters else None
            if (size is None) == (given.data is None):
                got = "neither" if size is None else "both"
                raise InvalidTensor(spec.name, "either data or binary_data_size", got)
            if size is None:
                found[spec.name] = from_values(given.data, given.shape, spec)
            else:
                found[spec.name] = _from_binary(rest[:size], size, given.shape, spec)
                rest = rest[size:]
        if rest:
            came = len(self.binary)
            raise MalformedBody(f"expected {came - len(rest):,} bytes after the JSON; got {came:,}")
        signature.validate_request(found)
        return found


def split(content: items.Body, json_bytes: str | None) -> Body:
    """`json_bytes` is the value of `HEADER`, if there is one. Raises `MalformedBody`."""
    body = memoryview(content)
    if json_bytes is None:
        return Body(schema.parse(bytes(body)), body[:0])
    if not (json_bytes.isascii() and json_bytes.isdecimal() and len(json_bytes) < 19 and int(json_bytes) <= len(body)):
        raise MalformedBody(f"expected {HEADER} of 0 to {len(body)}, the body's length; got {json_bytes[:80]!r}")
    end = int(json_bytes)
    return Body(schema.parse(bytes(body[:end])), body[end:])


def matched(inputs: Iterable[schema.Input], signature: Signature) -> Iterator[tuple[schema.Input, TensorSpec]]:
    """Each input with what the signature says of it; name, datatype and shape fit, so that nothing later can be
    surprised by its size. Raises `InvalidRequest`."""
    seen: set[str] = set()
    for given in inputs:
        spec = items.find(given.name, signature.asked)
        if spec.name in seen:
            raise InvalidTensor(spec.name, "one input of this name", "several")
        seen.add(spec.name)
        if given.datatype != DATATYPES[spec.dtype] or given.shape[1:] != list(spec.shape) or not given.shape:
            expected = f"{DATATYPES[spec.dtype]}{[-1, *spec.shape]}"
            raise InvalidTensor(spec.name, expected, f"{given.datatype[:20]}{given.shape}")
        _refuse_shared_memory(spec.name, given.parameters and given.parameters.shared_memory_region)
        yield given, spec


def from_values(values: Any, shape: Sequence[int], spec: TensorSpec) -> Array:
    """Lists, flat or nested -> an array of `shape`. Raises `InvalidTensor`."""
    array = from_lists(values, spec)
    if array.size != math.prod(shape):
        raise InvalidTensor(spec.name, f"{math.prod(shape):,} elements for shape {shape}", f"{array.size:,}")
    return array.reshape(shape)


def from_bytes(data: items.Body, shape: Sequence[int], spec: TensorSpec) -> Array:
    """Row-major, little-endian bytes -> an array of `shape`, without a copy. Raises `InvalidTensor`."""
    size = size_bytes(shape, spec)
    if len(data) != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes for shape {shape}", f"{len(data):,}")
    return items.view(data, spec, shape)


def to_bytes(array: Array) -> bytes:
    """Row-major and little-endian."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def size_bytes(shape: Sequence[int], spec: TensorSpec) -> int:
    return math.prod(shape) * spec.numpy_dtype.itemsize


def select(request: schema.InferRequest, specs: Iterable[TensorSpec]) -> dict[str, bool]:
    """The outputs that were asked for, all of `specs` by default; whether each is to be binary. Raises
    `InvalidRequest`."""
    names = [spec.name for spec in specs]
    by_default = request.parameters.binary_data_output
    selected: dict[str, bool] = {}
    for output in request.outputs or [schema.Output(name=name) for name in names]:
        if output.name not in names:
            raise UnknownOutput(output.name[:80], names)
        parameters = output.parameters or schema.OutputParameters()
        _refuse_shared_memory(output.name, parameters.shared_memory_region)
        if parameters.classification:
            raise InvalidRequest(f"{output.name}: classification is not offered; ask for the tensor itself")
        selected[output.name] = by_default if parameters.binary_data is None else parameters.binary_data
    return selected


def join(head: Mapping[str, Any], outputs: Mapping[str, Array], binary: Mapping[str, bool]) -> tuple[bytes, int | None]:
    """A response with `outputs`, each (B, *shape); `head` is what its JSON says before them.

    Returns the body and, if there is binary data in it, how many bytes of it are JSON.
    """
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, array in outputs.items():
        tensor: dict[str, Any] = {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": array.shape}
        if binary[name]:
            parts.append(to_bytes(array))
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        described.append(tensor)
    document = pydantic_core.to_json({**head, "outputs": described}, inf_nan_mode="strings")
    return (b"".join([document, *parts]), len(document)) if parts else (document, None)


def _from_binary(data: memoryview, declared: int, shape: Sequence[int], spec: TensorSpec) -> Array:
    size = size_bytes(shape, spec)
    if declared != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes for shape {shape}", f"a binary_data_size of {declared:,}")
    if len(data) != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes after the JSON", f"the last {len(data):,}")
    return np.require(from_bytes(data, shape, spec), requirements="A")  # JSON of any length is before it


def _refuse_shared_memory(name: str, region: Any) -> None:
    if region is not None:
        raise InvalidRequest(f"{name}: shared memory is not offered; send and take tensors in the body")
