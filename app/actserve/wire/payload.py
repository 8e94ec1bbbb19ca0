"""Payload: the decoded content of a body, and the checks that all encodings share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from actserve.core.completion import MAX_SEED
from actserve.core.errors import InvalidTensor, MalformedBody, UnsupportedContentType
from actserve.core.signature import IS_INIT, Array, Arrays, Exploration, TensorSpec, describe

Body = bytes | bytearray | memoryview

RAW = "application/octet-stream"
JSON = "application/json"
SAFETENSORS = "application/safetensors"
PNG = "image/png"
NPY = "application/x-npy"

MAX_VALUES = 1 << 20  # single JSON values: each takes up to a microsecond
MANY_VALUES = 1 << 12  # more of them take so long that they must not be read in the event loop
MANY_BYTES = 1 << 20  # in any other encoding


@dataclass(slots=True)
class Payload:
    """Named arrays, each (k, *shape). `batched` is false if the body holds one item without a batch axis (k = 1)."""

    tensors: Arrays
    batched: bool
    exploration: Exploration | None = None  # None: the policy's default
    seed: int | None = None  # None: a random one
    session: str | None = None  # the session that holds the state; None: the body carries the state

    @property
    def size(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def metadata(self) -> dict[str, Any]:
        """The fields other than the tensors that are set."""
        return {name: getattr(self, name) for name in METADATA if getattr(self, name) is not None}

    def wire_tensors(self) -> Arrays:
        """The tensors as a body holds them: row-major, without the batch axis if not `batched`."""
        return {n: np.asarray(a if self.batched else a[0], order="C") for n, a in self.tensors.items()}


def read_exploration(value: Any) -> Exploration:
    """Raises `MalformedBody` unless `value` is one of the two modes."""
    for known in get_args(Exploration):
        if value == known:
            result: Exploration = known
            return result
    raise MalformedBody(f"expected an exploration of {' or '.join(get_args(Exploration))}; got {value!r}"[:200])


def read_seed(value: Any) -> int:
    """Raises `MalformedBody` unless `value` is a whole number of 0 to 2**63 - 1."""
    if type(value) is str and value.isdecimal() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 0 <= value <= MAX_SEED:
        raise MalformedBody(f"expected a seed of 0 to 2**63 - 1; got {value!r}"[:200])
    return value


def read_session(value: Any) -> str:
    """Raises `MalformedBody` unless `value` has 1 to 200 visible ASCII characters."""
    if not (isinstance(value, str) and 0 < len(value) <= 200 and all("!" <= character <= "~" for character in value)):
        raise MalformedBody(f"expected a session id of 1 to 200 visible ASCII characters; got {value!r}"[:200])
    return value


def read_randomness(values: Mapping[str, Any]) -> tuple[Exploration | None, int | None]:
    """`values["exploration"]` and `values["seed"]`; None for a missing one. Raises `MalformedBody`."""
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
    """The metadata fields of a `Payload`. Raises `MalformedBody` for unknown names and wrong values."""
    for name in values:
        if name not in METADATA:
            raise MalformedBody(f"expected metadata of {', '.join(METADATA)}; got {name!r}"[:200])
    return {name: METADATA[name](value) for name, value in values.items()}


def check_json_size(document: bytes) -> None:
    """Raises `MalformedBody` for JSON with too many values. Does not parse."""
    if len(document) > MAX_VALUES:
        check_value_count(_count_values(document))


def takes_long(media_type: str, body: Body) -> bool:
    """Whether `body` takes so long to decode that it must be done outside of the event loop. Does not parse."""
    if media_type != JSON:
        return len(body) > MANY_BYTES
    return len(body) > MANY_VALUES and _count_values(body) > MANY_VALUES


def _count_values(document: Body) -> int:
    data = bytes(document) if isinstance(document, memoryview) else document
    return sum(data.count(separator) for separator in (b",", b"[", b":"))


def check_value_count(values: int) -> None:
    """Raises `MalformedBody` for more than `MAX_VALUES`."""
    if values > MAX_VALUES:
        raise MalformedBody(f"expected at most {MAX_VALUES:,} single values; got {values:,}: send tensors as bytes")


def single_spec(specs: Sequence[TensorSpec], content_type: str) -> TensorSpec:
    """The only spec. Raises `UnsupportedContentType` for several."""
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise UnsupportedContentType(f"{content_type}, which carries one tensor, for {names}", [JSON, SAFETENSORS])
    return specs[0]


def find_spec(name: str, specs: Sequence[TensorSpec]) -> TensorSpec:
    """The spec of this name. Raises `InvalidTensor`."""
    for spec in specs:
        if spec.name == name:
            return spec
    known = ", ".join(spec.name for spec in specs)
    raise InvalidTensor(name[:80], f"one of {known}", "an unknown name")


def array_from_bytes(data: Body, spec: TensorSpec, shape: Sequence[int]) -> Array:
    """Little-endian, row-major bytes -> an array of the spec's dtype, without a copy except for bfloat16.

    The caller has checked `shape` and the length of `data`. Raises `InvalidTensor` for booleans other than 0 and 1.
    """
    if spec.dtype == "bool":
        values = np.frombuffer(data, np.uint8)
        if values.size and values.max() > 1:
            raise InvalidTensor(spec.name, "bytes of 0 or 1 for bool", f"{values.max()}")
    return spec.from_wire(np.frombuffer(data, spec.wire_dtype).reshape(shape))


def check_shape(shape: Sequence[int], spec: TensorSpec) -> None:
    """Raises `InvalidTensor` unless `shape` is the shape of one item or of a batch."""
    if spec.name == IS_INIT.name and tuple(shape[1:]) == (1,):
        return  # TorchRL's own shape: [1] an item
    if tuple(shape) != spec.shape and (len(shape) == 0 or tuple(shape[1:]) != spec.shape):
        got = f"{spec.dtype}[{', '.join(map(str, shape[:9]))}{', …' if len(shape) > 9 else ''}]"
        raise InvalidTensor(spec.name, f"{spec}, or a batch of them", got[:200])


def build_payload(arrays: Mapping[str, Array], specs: Sequence[TensorSpec], metadata: Mapping[str, Any]) -> Payload:
    """`arrays` are all one item (*shape), or all a batch (k, *shape). Raises `MalformedBody` for a mixture."""
    if len(arrays) == 1:
        ((name, array),) = arrays.items()
        is_batch = array.ndim > len(find_spec(name, specs).shape)
        return Payload({name: array if is_batch else array[None]}, is_batch, **metadata)
    tensors: Arrays = {}
    batched: dict[str, bool] = {}
    for name, array in arrays.items():
        batched[name] = array.ndim > len(find_spec(name, specs).shape)
        tensors[name] = array if batched[name] else array[None]
    others = {batched[name] for name in batched if name != IS_INIT.name}
    if IS_INIT.name in arrays and len(others) == 1:
        flag, batch = arrays[IS_INIT.name], others == {True}
        if flag.ndim == batch + 1 and flag.shape[-1] == 1:  # TorchRL's own shape, [1] an item
            batched[IS_INIT.name], tensors[IS_INIT.name] = batch, flag.reshape(-1)
    if len(set(batched.values())) > 1:
        raise MalformedBody(f"expected every tensor as one item or every tensor as a batch; got a mixture: {batched}")
    return Payload(tensors, any(batched.values()), **metadata)


def check_complete(payload: Payload, specs: Sequence[TensorSpec]) -> None:
    """Raises `InvalidTensor` unless all `specs` are present, with the same number of items, at least one."""
    for spec in specs:
        if spec.name not in payload.tensors:
            raise InvalidTensor(spec.name, str(spec), "nothing")
        array = payload.tensors[spec.name]
        if len(array) != payload.size or not len(array):
            raise InvalidTensor(spec.name, "the same number of items in every tensor, at least one", describe(array))
