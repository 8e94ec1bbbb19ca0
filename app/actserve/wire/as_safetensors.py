"""application/safetensors: named tensors and metadata, such as a TensorDict.

A body is the header's length (8 bytes, little-endian), the header (JSON: dtype, shape and offsets of each tensor, and
metadata, string to string), and the tensors' bytes, back to back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pydantic_core

from actserve.core.errors import InvalidTensor, MalformedBody
from actserve.core.signature import Array, TensorSpec
from actserve.wire.payload import (
    Body,
    Payload,
    array_from_bytes,
    build_payload,
    check_shape,
    find_spec,
    read_metadata,
)

_Entry = tuple[int, int, str, str, list[int]]  # begin, end, name, dtype, shape
MAX_HEADER_BYTES = 64 << 10
CACHED_HEADER_BYTES = 2048
_DTYPES = {
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "bool": "BOOL",
}


def read(body: Body, specs: Sequence[TensorSpec]) -> Payload:
    """The tensors are views of `body`, except those of bfloat16.

    The library's reader copies them twice, which takes milliseconds per batch, and its numpy form has no bfloat16.
    """
    header, data = _split(memoryview(body))
    entries, metadata = _read_header(header)
    arrays: dict[str, Array] = {}
    at = 0
    for begin, end, name, dtype, shape in entries:
        if begin != at:
            raise MalformedBody(f"expected {name[:80]!r} to begin at byte {at} of the tensors; got {begin}"[:200])
        at = end
        arrays[name] = _array(data[begin:end], dtype, shape, find_spec(name, specs))
    if at != len(data):
        raise MalformedBody(f"expected {at:,} bytes of tensors; got {len(data):,}")
    return build_payload(arrays, specs, read_metadata(metadata) if metadata else {})


def write(payload: Payload, specs: Sequence[TensorSpec]) -> bytes:
    metadata = {name: str(value) for name, value in payload.metadata.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    parts, at = [], 0
    tensors = [(find_spec(name, specs), array) for name, array in payload.wire_tensors().items()]
    for spec, array in sorted(tensors, key=lambda each: (-each[0].wire_dtype.itemsize, each[0].name)):  # all aligned
        parts.append(spec.to_wire(array).tobytes())
        end = at + len(parts[-1])
        header[spec.name] = {"dtype": _DTYPES[spec.dtype], "shape": array.shape, "data_offsets": (at, end)}
        at = end
    text = pydantic_core.to_json(header)
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _split(body: memoryview) -> tuple[bytes, memoryview]:
    """-> (header, the tensors' bytes)."""
    if len(body) < 8:
        raise MalformedBody(f"expected safetensors, which begin with 8 bytes; got {len(body)}")
    header_bytes = int.from_bytes(body[:8], "little")
    limit_bytes = min(MAX_HEADER_BYTES, len(body) - 8)
    if header_bytes > limit_bytes:
        raise MalformedBody(f"expected a safetensors header of at most {limit_bytes:,} bytes; got {header_bytes:,}")
    return bytes(body[8 : 8 + header_bytes]), body[8 + header_bytes :]


def _read_header(header: bytes) -> tuple[list[_Entry], dict[str, str]]:
    """The tensors in the order of their bytes, and the metadata."""
    return _read_again(header) if len(header) <= CACHED_HEADER_BYTES else _parse_header(header)


def _parse_header(header: bytes) -> tuple[list[_Entry], dict[str, str]]:
    try:
        document = pydantic_core.from_json(header, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBody(f"expected a safetensors header in JSON; got something else: {error}") from None
    if not isinstance(document, dict):
        raise MalformedBody("expected a safetensors header that is a JSON object; got something else")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedBody("expected safetensors metadata of text; got something else")
    return sorted(_read_entry(name, entry) for name, entry in document.items()), metadata


_read_again = lru_cache(256)(_parse_header)  # a client sends the same header with each request


def _read_entry(name: str, entry: Any) -> _Entry:
    """One tensor's entry in the header -> (begin, end, name, dtype, shape)."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **others} if not others:
            if all(type(number) is int and number >= 0 for number in (*shape, begin, end)) and begin <= end:
                return begin, end, name, dtype, shape
    raise MalformedBody(f'{name[:80]}: expected {{"dtype", "shape", "data_offsets"}}; got {entry!r}'[:300])


def _array(data: memoryview, dtype: str, shape: list[int], spec: TensorSpec) -> Array:
    if dtype != _DTYPES[spec.dtype]:
        raise InvalidTensor(spec.name, f"dtype {_DTYPES[spec.dtype]} ({spec})", dtype[:80])
    check_shape(shape, spec)
    size = spec.wire_dtype.itemsize * math.prod(shape)
    if len(data) != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes for shape {shape}"[:200], f"{len(data):,} bytes")
    array = array_from_bytes(data, spec, shape)
    return array if array.flags.aligned else array.copy()  # programs need aligned memory
