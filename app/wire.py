"""Request and response bodies <-> named arrays: the same code on both ends of the wire.

A body is one item, or a batch of k items with a leading axis. Items in, items out; batch in, batch out.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pydantic_core

from app.errors import InvalidTensor, MalformedBody, NotAcceptable, UnsupportedContentType
from app.requests import MAX_SEED
from app.signature import Array, Arrays, Exploration, Signature, TensorSpec, describe

RAW = "application/octet-stream"
JSON = "application/json"


@dataclass(frozen=True)
class Items:
    """Named arrays, each (k, *shape). `batched` says whether the other side spoke of a batch or of one item (k = 1)."""

    tensors: Arrays
    batched: bool
    exploration: Exploration | None = None  # None: as the policy does by default
    seed: int | None = None  # of what is random; None: a fresh one

    @property
    def size(self) -> int:
        return len(next(iter(self.tensors.values())))


def decode(content_type: str, body: bytes | bytearray | memoryview, signature: Signature) -> Items:
    """A request body -> what a program takes. Raises an `InvalidRequest` that says what was expected and what came."""
    decoder = _DECODERS.get(_essence(content_type))
    if decoder is None:
        raise UnsupportedContentType(content_type, list(_DECODERS))
    items = decoder(body, signature)
    signature.validate_request(items.tensors)
    return items


def read_exploration(value: Any) -> Exploration:
    """Raises `MalformedBody` for anything but one of the two words."""
    for known in get_args(Exploration):
        if value == known:
            result: Exploration = known
            return result
    raise MalformedBody(f"expected an exploration of {' or '.join(get_args(Exploration))}; got {value!r}"[:200])


def read_seed(value: Any) -> int:
    """Raises `MalformedBody` for anything but a whole number of 0 to 2**63 - 1."""
    if type(value) is str and value.isdecimal() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 0 <= value <= MAX_SEED:
        raise MalformedBody(f"expected a seed of 0 to 2**63 - 1; got {value!r}"[:200])
    return value


def encode(accept: str, outputs: Mapping[str, Array], batched: bool, seed: int | None = None) -> tuple[str, bytes]:
    """A policy's outputs, each (k, *shape) -> (content type, body), in the encoding that `accept` prefers.

    `seed` is what anything random came from; JSON carries it beside the outputs.
    """
    content_type = negotiate(accept)
    return content_type, _ENCODERS[content_type](outputs, batched, seed)


def negotiate(accept: str) -> str:
    """The encoding for an Accept header (RFC 9110, 12.5.1): the best quality, JSON first among equals."""
    quality, content_type = max(((_quality(accept, known), known) for known in _ENCODERS), key=lambda pair: pair[0])
    if quality <= 0:
        raise NotAcceptable(accept[:200], list(_ENCODERS))
    return content_type


def _quality(accept: str, content_type: str) -> float:
    """How much an Accept header wants `content_type`; the most specific range that matches decides."""
    if not accept.strip():
        return 1.0
    ranges = {"*/*": 0, content_type.split("/")[0] + "/*": 1, content_type: 2}
    found = (-1, 0.0)
    for part in accept.split(","):
        essence, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if essence in ranges:
            weights = [p[2:] for p in parameters if p.startswith("q=")]
            try:
                found = max(found, (ranges[essence], float(weights[0]) if weights else 1.0))
            except ValueError:
                continue
    return found[1]


def _essence(content_type: str) -> str:
    return content_type.split(";", 1)[0].strip().lower()


# --- application/octet-stream: the single observation, row-major; k items back to back are a batch of k


def _decode_raw(body: bytes | bytearray | memoryview, signature: Signature) -> Items:
    if len(signature.observations) != 1:
        names = ", ".join(spec.name for spec in signature.observations)
        raise UnsupportedContentType(f"{RAW}, which can carry one tensor and this policy takes {names}", [JSON])
    spec = signature.observations[0]
    count, rest = divmod(len(body), spec.item_bytes)
    if count == 0 or rest:
        raise InvalidTensor(
            spec.name, f"{spec.item_bytes:,} bytes for one item ({spec}), or a multiple", f"{len(body):,} bytes"
        )
    array = np.frombuffer(body, spec.numpy_dtype.newbyteorder("<")).reshape(count, *spec.shape)
    return Items({spec.name: array}, batched=count > 1)


def _encode_raw(outputs: Mapping[str, Array], batched: bool, seed: int | None) -> bytes:
    if len(outputs) != 1:
        raise NotAcceptable(f"{RAW}, which can carry one output, and {len(outputs)} were asked for", [JSON])
    (array,) = outputs.values()
    return np.ascontiguousarray(array).tobytes()


# --- application/json: {"name": nested lists, or {"dtype", "shape", "b64"}}, and "exploration" and "seed"


def _decode_json(body: bytes | bytearray | memoryview, signature: Signature) -> Items:
    try:
        document = pydantic_core.from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBody(f"expected JSON; got something else: {error}") from None
    if not isinstance(document, dict):
        raise MalformedBody(
            f'expected a JSON object {{"{signature.observations[0].name}": …}}; got {_json_kind(document)}'
        )
    exploration = read_exploration(document.pop("exploration")) if "exploration" in document else None
    seed = read_seed(document.pop("seed")) if "seed" in document else None
    specs = {spec.name: spec for spec in signature.asked}
    tensors: Arrays = {}
    batched: dict[str, bool] = {}
    for name, value in document.items():
        if name not in specs:
            raise InvalidTensor(name[:80], f"one of the inputs {', '.join(specs)}", "a name that is none of them")
        array = _from_json(value, specs[name])
        batched[name] = array.ndim > len(specs[name].shape)
        tensors[name] = array if batched[name] else array[None]
    if len(set(batched.values())) > 1:
        raise MalformedBody(f"expected every input as one item or every input as a batch; got a mixture: {batched}")
    return Items(tensors, any(batched.values()), exploration, seed)


def _from_json(value: Any, spec: TensorSpec) -> Array:
    """One JSON value -> an array of the spec's dtype, (*shape) or (k, *shape). Never wraps, rounds or guesses."""
    array = _from_b64(value, spec) if isinstance(value, dict) else _from_lists(value, spec)
    if array.shape != spec.shape and array.shape[1:] != spec.shape:
        raise InvalidTensor(spec.name, f"{spec}, or a batch of them", describe(array))
    return array


def _from_lists(value: Any, spec: TensorSpec) -> Array:
    try:
        array = np.array(value)
    except ValueError:
        raise InvalidTensor(spec.name, f"{spec} as nested lists", "lists of unequal length") from None
    accepted = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[spec.numpy_dtype.kind]
    if array.dtype.kind not in accepted:
        kinds = {"b": "booleans", "u": "integers", "i": "integers", "f": "numbers"}
        raise InvalidTensor(spec.name, kinds[spec.numpy_dtype.kind], _KIND_NAMES.get(array.dtype.kind, "other values"))
    if spec.numpy_dtype.kind in "ui":
        limits = np.iinfo(spec.numpy_dtype)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise InvalidTensor(spec.name, f"{limits.min} to {limits.max}", f"{array.min()} to {array.max()}")
    return np.asarray(array, spec.numpy_dtype, order="C")


_KIND_NAMES = {"b": "booleans", "i": "integers", "u": "integers", "f": "fractions", "U": "text", "O": "mixed values"}


def _from_b64(value: dict[str, Any], spec: TensorSpec) -> Array:
    if set(value) != {"dtype", "shape", "b64"}:
        raise InvalidTensor(spec.name, 'nested lists or {"dtype", "shape", "b64"}', f"an object with {sorted(value)}")
    dtype, shape, b64 = value["dtype"], value["shape"], value["b64"]
    if dtype != spec.dtype:
        raise InvalidTensor(spec.name, f"dtype {spec.dtype!r}", f"{dtype!r}"[:80])
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        raise InvalidTensor(spec.name, "a shape as a list of whole numbers", f"{shape!r}"[:80])
    try:
        data = base64.b64decode(b64, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise InvalidTensor(spec.name, "base64 text in b64", "something else") from None
    size = spec.numpy_dtype.itemsize
    for extent in shape:
        size *= extent
    if len(data) != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes for shape {shape}", f"{len(data):,} bytes")
    return np.frombuffer(data, spec.numpy_dtype.newbyteorder("<")).reshape(shape)


def _encode_json(outputs: Mapping[str, Array], batched: bool, seed: int | None) -> bytes:
    document: dict[str, Any] = {name: (array if batched else array[0]).tolist() for name, array in outputs.items()}
    if seed is not None:
        document["seed"] = seed
    return pydantic_core.to_json(document, inf_nan_mode="strings")


def _json_kind(value: object) -> str:
    return {list: "a list", str: "text", type(None): "null", bool: "a boolean"}.get(type(value), "a number")


_DECODERS: dict[str, Callable[[bytes | bytearray | memoryview, Signature], Items]] = {
    RAW: _decode_raw,
    JSON: _decode_json,
}
_ENCODERS: dict[str, Callable[[Mapping[str, Array], bool, int | None], bytes]] = {
    JSON: _encode_json,
    RAW: _encode_raw,
}
