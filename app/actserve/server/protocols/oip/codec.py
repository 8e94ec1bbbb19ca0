"""Infer requests <-> named arrays, as far as it is the same over HTTP and gRPC."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from actserve.core.errors import InvalidRequest, InvalidTensor, UnknownOutput
from actserve.core.signature import Array, Signature, TensorSpec
from actserve.server.protocols.oip import schema
from actserve.wire.as_json import array_from_lists
from actserve.wire.oip import DATATYPES
from actserve.wire.payload import Body, array_from_bytes, find_spec


def matched(inputs: Iterable[schema.Input], signature: Signature) -> Iterator[tuple[schema.Input, TensorSpec]]:
    """Each input with what the signature says of it; name, datatype and shape fit, so that nothing later can be
    surprised by its size. Raises `InvalidRequest`."""
    seen: set[str] = set()
    for given in inputs:
        spec = find_spec(given.name, signature.request_inputs)
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
    array = array_from_lists(values, spec)
    if array.size != math.prod(shape):
        raise InvalidTensor(spec.name, f"{math.prod(shape):,} elements for shape {shape}", f"{array.size:,}")
    return array.reshape(shape)


def from_bytes(data: Body, shape: Sequence[int], spec: TensorSpec) -> Array:
    """Row-major, little-endian bytes -> an array of `shape`, without a copy. Raises `InvalidTensor`."""
    size = size_bytes(shape, spec)
    if len(data) != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes for shape {shape}", f"{len(data):,}")
    return array_from_bytes(data, spec, shape)


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


def _refuse_shared_memory(name: str, region: Any) -> None:
    if region is not None:
        raise InvalidRequest(f"{name}: shared memory is not offered; send and take tensors in the body")
