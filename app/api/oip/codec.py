"""Infer bodies <-> named arrays.

A body is JSON. A tensor's data is in it, or follows it, one tensor after the other, row-major and little-endian (the
binary tensor data extension): then `Inference-Header-Content-Length` says where the JSON ends, and each such tensor
gives its `binary_data_size`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic_core

from app.api.oip import schema
from app.errors import InvalidRequest, InvalidTensor, MalformedBody, UnknownOutput
from app.signature import Array, Arrays, Signature, TensorSpec
from app.wire import items
from app.wire.as_json import from_lists

HEADER = "Inference-Header-Content-Length"
DATATYPES = {"uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float32": "FP32", "float64": "FP64", "bool": "BOOL"}


@dataclass(frozen=True)
class Body:
    """An infer request, taken apart: the JSON, and what follows it."""

    request: schema.InferRequest
    binary: memoryview


def split(content: items.Body, json_bytes: str | None) -> Body:
    """`json_bytes` is the value of `HEADER`, if there is one. Raises `MalformedBody`."""
    body = memoryview(content)
    if json_bytes is None:
        return Body(schema.parse(bytes(body)), body[:0])
    if not (json_bytes.isascii() and json_bytes.isdecimal() and len(json_bytes) < 19 and int(json_bytes) <= len(body)):
        raise MalformedBody(f"expected {HEADER} of 0 to {len(body)}, the body's length; got {json_bytes[:80]!r}")
    end = int(json_bytes)
    return Body(schema.parse(bytes(body[:end])), body[end:])


def tensors(body: Body, signature: Signature) -> Arrays:
    """The inputs, a valid request: each (B, *shape). Raises `InvalidTensor` or `MalformedBody`."""
    found: Arrays = {}
    rest = body.binary
    for given in body.request.inputs:
        spec = items.find(given.name, signature.asked)
        if spec.name in found:
            raise InvalidTensor(spec.name, "one input of this name", "several")
        _check(given, spec)
        size = given.parameters.binary_data_size if given.parameters else None
        if size is None:
            found[spec.name] = _from_json(given, spec)
        else:
            found[spec.name] = _from_binary(given, spec, rest[:size])
            rest = rest[size:]
    if rest:
        raise MalformedBody(f"expected {len(body.binary) - len(rest):,} bytes after the JSON; got {len(body.binary):,}")
    signature.validate_request(found)
    return found


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
            parts.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        described.append(tensor)
    document = pydantic_core.to_json({**head, "outputs": described}, inf_nan_mode="strings")
    return (b"".join([document, *parts]), len(document)) if parts else (document, None)


def _check(given: schema.Input, spec: TensorSpec) -> None:
    """Datatype and shape, and that the data is here: then nothing below can be surprised by its size."""
    expected = f"{DATATYPES[spec.dtype]}{[-1, *spec.shape]}"
    if given.datatype != DATATYPES[spec.dtype] or given.shape[1:] != list(spec.shape) or not given.shape:
        raise InvalidTensor(spec.name, expected, f"{given.datatype[:20]}{given.shape}")
    _refuse_shared_memory(spec.name, given.parameters and given.parameters.shared_memory_region)
    binary = given.parameters is not None and given.parameters.binary_data_size is not None
    if binary == (given.data is not None):
        raise InvalidTensor(spec.name, "either data or binary_data_size", "both" if binary else "neither")


def _from_json(given: schema.Input, spec: TensorSpec) -> Array:
    array = from_lists(given.data, spec)
    if array.size != math.prod(given.shape):
        raise InvalidTensor(spec.name, f"{_elements(given.shape)} for shape {given.shape}", f"{array.size:,}")
    return array.reshape(given.shape)


def _from_binary(given: schema.Input, spec: TensorSpec, data: memoryview) -> Array:
    size = math.prod(given.shape) * spec.numpy_dtype.itemsize
    declared = given.parameters.binary_data_size if given.parameters else None
    if declared != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes for shape {given.shape}", f"a binary_data_size of {declared:,}")
    if len(data) != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes after the JSON", f"the last {len(data):,}")
    return np.require(items.view(data, spec, given.shape), requirements="A")  # JSON of any length is before it


def _elements(shape: Sequence[int]) -> str:
    return f"{math.prod(shape):,} elements"


def _refuse_shared_memory(name: str, region: Any) -> None:
    if region is not None:
        raise InvalidRequest(f"{name}: shared memory is not offered; send and take tensors in the body")
