"""Payload: what a body holds, whatever its encoding; and the checks that all encodings share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from actserve.core.completion import MAX_SEED
from actserve.core.errors import InvalidTensor, MalformedBody
from actserve.core.signature import Array, Arrays, Exploration, TensorSpec, describe

Body = bytes | bytearray | memoryview

RAW = "application/octet-stream"
JSON = "application/json"
SAFETENSORS = "application/safetensors"
PNG = "image/png"

MAX_VALUES = 1 << 20  # one by one, as JSON has them: each costs up to a microsecond, in which nobody else is served


@dataclass(frozen=True)
class Payload:
    """Named arrays, each (k, *shape). `batched` says whether the other side spoke of a batch or of one item (k = 1)."""

    tensors: Arrays
    batched: bool
    exploration: Exploration | None = None  # None: as the policy does by default
    seed: int | None = None  # of what is random; None: a fresh one
    session: str | None = None  # whose state to go on from; None: what the body carries

    @property
    def size(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def metadata(self) -> dict[str, Any]:
        """What is said beside the tensors."""
        return {name: getattr(self, name) for name in METADATA if getattr(self, name) is not None}

    def as_spoken(self) -> Arrays:
        """The tensors with the batch axis only if there is a batch; row-major."""
        return {n: np.asarray(a if self.batched else a[0], order="C") for n, a in self.tensors.items()}


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


def read_session(value: Any) -> str:
    """Raises `MalformedBody` for anything but 1 to 200 visible ASCII characters."""
    if not (isinstance(value, str) and 0 < len(value) <= 200 and all("!" <= character <= "~" for character in value)):
        raise MalformedBody(f"expected a session id of 1 to 200 visible ASCII characters; got {value!r}"[:200])
    return value


def read_randomness(values: Mapping[str, Any]) -> tuple[Exploration | None, int | None]:
    """What `values` have as "exploration" and as "seed"; None for what they have not. Raises `MalformedBody`."""
    exploration, seed = values.get("exploration"), values.get("seed")
    return (
        None if exploration is None else read_exploration(exploration),
        None if seed is None else read_seed(seed),
    )


METADATA: dict[str, Callable[[Any], Any]] = {
    "exploration": read_exploration,
    "seed": read_seed,
    "session": read_session,
}


def read_metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Payload` that are no tensors. Raises `MalformedBody` for other names and for wrong values."""
    for name in values:
        if name not in METADATA:
            raise MalformedBody(f"expected metadata of {', '.join(METADATA)}; got {name!r}"[:200])
    return {name: METADATA[name](value) for name, value in values.items()}


def check_json(document: bytes) -> None:
    """Raises `MalformedBody` for JSON of too many values; looks at no more than their number."""
    if len(document) > MAX_VALUES:
        check_count(sum(document.count(mark) for mark in (b",", b"[", b":")))


def check_count(values: int) -> None:
    """Raises `MalformedBody`."""
    if values > MAX_VALUES:
        raise MalformedBody(
            f"expected at most {MAX_VALUES:,} values that are spelled out; got {values:,}: send tensors as bytes"
        )


def find(name: str, specs: Sequence[TensorSpec]) -> TensorSpec:
    """The spec of this name, or `InvalidTensor`."""
    for spec in specs:
        if spec.name == name:
            return spec
    known = ", ".join(spec.name for spec in specs)
    raise InvalidTensor(name[:80], f"one of {known}", "a name that is none of them")


def view(data: Body, spec: TensorSpec, shape: Sequence[int]) -> Array:
    """Little-endian, row-major bytes -> an array of the spec's dtype, without a copy.

    `shape` has been checked, and has as many bytes. Raises `InvalidTensor` for booleans that are neither.
    """
    if spec.dtype == "bool":
        values = np.frombuffer(data, np.uint8)
        if values.size and values.max() > 1:
            raise InvalidTensor(spec.name, "bytes of 0 or 1 for bool", f"{values.max()}")
    return np.frombuffer(data, spec.numpy_dtype.newbyteorder("<")).reshape(shape)


def check_shape(shape: Sequence[int], spec: TensorSpec) -> None:
    """Raises `InvalidTensor` unless `shape` is that of one item or of a batch of them."""
    if tuple(shape) != spec.shape and (len(shape) == 0 or tuple(shape[1:]) != spec.shape):
        got = f"{spec.dtype}[{', '.join(map(str, shape[:9]))}{', …' if len(shape) > 9 else ''}]"
        raise InvalidTensor(spec.name, f"{spec}, or a batch of them", got[:200])


def gather(arrays: Mapping[str, Array], specs: Sequence[TensorSpec], metadata: Mapping[str, Any]) -> Payload:
    """Combine arrays, each one item (*shape) or a batch (k, *shape). Raises `MalformedBody` for a mixture."""
    tensors: Arrays = {}
    batched: dict[str, bool] = {}
    for name, array in arrays.items():
        batched[name] = array.ndim > len(find(name, specs).shape)
        tensors[name] = array if batched[name] else array[None]
    if len(set(batched.values())) > 1:
        raise MalformedBody(f"expected every tensor as one item or every tensor as a batch; got a mixture: {batched}")
    return Payload(tensors, any(batched.values()), **metadata)


def check_complete(items: Payload, specs: Sequence[TensorSpec]) -> None:
    """Raises `InvalidTensor` unless every one of `specs` is there, all with the same number of items, at least one."""
    for spec in specs:
        if spec.name not in items.tensors:
            raise InvalidTensor(spec.name, str(spec), "nothing")
        array = items.tensors[spec.name]
        if len(array) != items.size or not len(array):
            raise InvalidTensor(spec.name, "the same number of items in every tensor, at least one", describe(array))
