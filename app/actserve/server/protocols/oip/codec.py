"""Infer requests <-> named arrays: the part that HTTP and gRPC share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from actserve.core.errors import InvalidRequest, InvalidTensor, UnknownOutput
from actserve.core.signature import Array, Signature, TensorSpec
from actserve.server.protocols.oip.infer_request import InferRequest, Input, Output, OutputParameters
from actserve.wire.as_json import array_from_lists
from actserve.wire.oip import DATATYPES
from actserve.wire.payload import Body, array_from_bytes, find_spec


def match_inputs(inputs: Iterable[Input], signature: Signature) -> Iterator[tuple[Input, TensorSpec]]:
    """Each input with its spec. The checks of datatype and shape bound its size. Raises `InvalidRequest`."""
    seen: set[str] = set()
    for given in inputs:
        spec = find_spec(given.name, signature.request_inputs)
        if spec.name in seen:
            raise InvalidTensor(spec.name, "one input of this name", "several")
        seen.add(spec.name)
        if given.datatype != DATATYPES[spec.dtype] or given.shape[1:] != list(spec.shape) or not given.shape:
            expected = f"{DATATYPES[spec.dtype]}{[-1, *spec.shape]}"
            raise InvalidTensor(spec.name, expected, f"{given.datatype[:20]}{given.shape}")
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


def size_bytes(shape: Sequence[int], spec: TensorSpec) -> int:
    return math.prod(shape) * spec.wire_dtype.itemsize


def select_outputs(request: InferRequest, specs: Iterable[TensorSpec]) -> dict[str, bool]:
    """The requested outputs, by default all of `specs`, and whether each is sent as binary. Raises `InvalidRequest`."""
    names = [spec.name for spec in specs]
    default = request.parameters.binary_data_output
    selected: dict[str, bool] = {}
    for output in request.outputs or [Output(name=name) for name in names]:
        if output.name not in names:
            raise UnknownOutput(output.name[:80], names)
        parameters = output.parameters or OutputParameters()
        if parameters.classification:
            raise InvalidRequest(f"{output.name}: classification is not offered; ask for the tensor itself")
        selected[output.name] = default if parameters.binary_data is None else parameters.binary_data
    return selected


def placed_outputs(request: InferRequest) -> dict[str, OutputParameters]:
    """The outputs that the client wants in a region of shared memory."""
    outputs = request.outputs or ()
    return {each.name: each.parameters for each in outputs if each.parameters and each.parameters.shared_memory_region}


def refuse_shared_memory(request: InferRequest) -> None:
    """Raises `InvalidRequest` if a tensor is in shared memory."""
    for tensor in (*request.inputs, *(request.outputs or ())):
        if tensor.parameters and tensor.parameters.shared_memory_region is not None:
            raise InvalidRequest(f"{tensor.name}: shared memory is not offered over gRPC; send tensors in the message")
