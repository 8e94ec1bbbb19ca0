"""application/json: {"name": nested lists, or {"dtype", "shape", "b64"}}, and "exploration", "seed" and "session".

JSON has no infinities and no NaN; they are written as the strings "Infinity", "-Infinity" and "NaN".
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pydantic_core

from actserve.core.errors import InvalidTensor, MalformedBody
from actserve.core.signature import Array, TensorSpec
from actserve.wire import large_json
from actserve.wire.payload import (
    METADATA,
    Body,
    Payload,
    array_from_bytes,
    build_payload,
    check_json_size,
    check_shape,
    find_spec,
    read_metadata,
)


def read(body: Body, specs: Sequence[TensorSpec]) -> Payload:
    text = bytes(body)
    check_json_size(text)
    try:
        document = large_json.load(text)
    except ValueError as error:
        raise MalformedBody(f"expected JSON; got something else: {error}") from None
    if not isinstance(document, dict):
        raise MalformedBody(f'expected a JSON object {{"{specs[0].name}": …}}; got {_json_type(document)}')
    metadata = read_metadata({name: document.pop(name) for name in METADATA if name in document})
    arrays = {name: _array(value, find_spec(name, specs)) for name, value in document.items()}
    return build_payload(arrays, specs, metadata)


def write(payload: Payload, _specs: Sequence[TensorSpec]) -> bytes:
    fields = [pydantic_core.to_json(name) + b":" + large_json.dump(a) for name, a in payload.wire_tensors().items()]
    fields += [pydantic_core.to_json({name: value})[1:-1] for name, value in payload.metadata.items()]
    return b"{" + b",".join(fields) + b"}"


def _array(value: Any, spec: TensorSpec) -> Array:
    """One JSON value -> an array of the spec's dtype, (*shape) or (k, *shape). Values never wrap or round."""
    if isinstance(value, dict):
        return _array_from_b64(value, spec)
    array = array_from_lists(value, spec)
    check_shape(array.shape, spec)
    return array


def array_from_lists(value: Any, spec: TensorSpec) -> Array:
    """Nested lists of any shape -> an array of the spec's dtype. Raises `InvalidTensor`. Empties large lists.

    `np.array(value)` would be unsafe: it gives every element as much memory as the longest string needs.
    """
    short = _from_short_list(value, spec)
    if short is not None:
        return short
    shape, flat, types = _flatten(value, spec)
    kind = spec.numpy_dtype.kind
    infinities = 0  # that are spelled out, as "Infinity"
    if kind == "f" and str in types:
        infinities = sum(type(element) is str and element.endswith("Infinity") for element in flat)
        flat = [_NON_FINITE.get(element, element) if type(element) is str else element for element in flat]
        types = _types(flat)
    wrong = types - _ACCEPTED[kind]
    if wrong:
        got = _TYPE_NAMES.get(wrong.pop(), "mixed values") if len(wrong) == 1 else "mixed values"
        raise InvalidTensor(spec.name, _ACCEPTED_NAMES[kind], got)
    try:
        array = _from_flat(flat, _WIDEST[kind])
    except OverflowError:
        raise InvalidTensor(spec.name, _ACCEPTED_NAMES[kind], "one of more than 64 bits") from None
    if kind == "f" and np.isinf(array).sum() > infinities:
        low, high = spec.limits
        raise InvalidTensor(spec.name, f"{low} to {high}", "a larger number")
    if kind != "b":
        low, high = spec.limits
        finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        if finite.size and (finite.min() < low or finite.max() > high):
            raise InvalidTensor(spec.name, f"{low} to {high}", f"{finite.min()} to {finite.max()}")
    return np.asarray(array, spec.numpy_dtype).reshape(shape)


def _from_short_list(value: Any, spec: TensorSpec) -> Array | None:
    """A short flat list -> (n,); None for everything else, and for whatever is wrong. Most observations are such a
    list, and each call of numpy takes as long as all of this."""
    if type(value) is not list or not 0 < len(value) <= SHORT:
        return None
    kind = spec.numpy_dtype.kind
    if not _ACCEPTED[kind].issuperset(map(type, value)):
        return None
    if kind != "b":
        low, high = map(float if kind == "f" else int, spec.limits)
        if not low <= min(value) <= max(value) <= high:
            return None
    return np.array(value, spec.numpy_dtype)


def _flatten(value: Any, spec: TensorSpec) -> tuple[list[int], list[Any], set[type]]:
    """-> (shape, elements in row-major order, their types). Raises `InvalidTensor` for lists of unequal length."""
    shape: list[int] = []
    flat, types = [value], {type(value)}
    while types == {list}:
        lengths = set().union(*(map(len, part) for part in _parts(flat)))
        if len(lengths) > 1:
            raise InvalidTensor(spec.name, f"{spec} as nested lists", "lists of unequal length")
        shape += lengths
        if len(shape) > _MAX_DEPTH:
            raise InvalidTensor(spec.name, f"{spec} as nested lists", f"more than {_MAX_DEPTH} levels")
        if len(flat) * max(lengths, default=0) <= large_json.PIECE_VALUES:
            flat = list(chain.from_iterable(flat))
        else:
            flat = [element for part in large_json.pieces(flat) for inner in part for element in _drained(inner)]
        types = _types(flat)
    return shape, flat, types


def _parts(values: list[Any]) -> Iterator[list[Any]]:
    """The values in short lists. No call takes long, so a thread that reads a large body lets the event loop run."""
    size = large_json.PIECE_VALUES
    return (values[start : start + size] for start in range(0, len(values), size))


def _drained(values: list[Any]) -> Iterable[Any]:
    if len(values) <= large_json.PIECE_VALUES:
        return values
    return chain.from_iterable(large_json.pieces(values))


def _types(values: list[Any]) -> set[type]:
    return set().union(*(map(type, part) for part in _parts(values)))


def _from_flat(values: list[Any], dtype: Any) -> Array:
    arrays = [np.array(part, dtype) for part in _parts(values)]
    return np.concatenate(arrays) if arrays else np.array([], dtype)


SHORT = 64
_MAX_DEPTH = 32
_NON_FINITE = {"Infinity": np.inf, "-Infinity": -np.inf, "NaN": np.nan}
_WIDEST = {"b": np.bool_, "u": np.int64, "i": np.int64, "f": np.float64}
_ACCEPTED: dict[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}}
_ACCEPTED_NAMES = {"b": "booleans", "u": "integers", "i": "integers", "f": "numbers"}
_TYPE_NAMES: dict[type, str] = {bool: "booleans", int: "integers", float: "fractions", str: "text"}


def _array_from_b64(value: dict[str, Any], spec: TensorSpec) -> Array:
    if set(value) != {"dtype", "shape", "b64"}:
        got = f"an object with {sorted(value)}"[:200]
        raise InvalidTensor(spec.name, 'nested lists or {"dtype", "shape", "b64"}', got)
    dtype, shape, b64 = value["dtype"], value["shape"], value["b64"]
    if dtype != spec.dtype:
        raise InvalidTensor(spec.name, f"dtype {spec.dtype!r}", f"{dtype!r}"[:80])
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise InvalidTensor(spec.name, "a shape as a list of whole numbers", f"{shape!r}"[:80])
    check_shape(shape, spec)
    try:
        data = bytearray(base64.b64decode(b64, validate=True))  # writable, so that runtimes need no copy
    except (binascii.Error, ValueError, TypeError):
        raise InvalidTensor(spec.name, "base64 text in b64", "something else") from None
    size = spec.wire_dtype.itemsize * math.prod(shape)
    if len(data) != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes for shape {shape}", f"{len(data):,} bytes")
    return array_from_bytes(data, spec, shape)


def _json_type(value: object) -> str:
    return {list: "a list", str: "text", type(None): "null", bool: "a boolean"}.get(type(value), "a number")
