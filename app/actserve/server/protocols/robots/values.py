"""One value of a robot's observation -> the tensor of an input."""

from __future__ import annotations

from typing import Any

import numpy as np

from actserve.core.errors import InvalidTensor
from actserve.core.robot import Resize, Robot
from actserve.core.signature import Array, TensorSpec, describe
from actserve.engine.policy import Policy
from actserve.server.protocols.robots import images
from actserve.wire import as_png
from actserve.wire.as_json import array_from_lists

MANY_BYTES = 64 << 10  # of encoded images: more take a millisecond or longer to decode


def to_tensor(value: Any, spec: TensorSpec, resizes: Resize = "") -> Array:
    """(1, *shape) of the input's dtype, writable. Raises `InvalidTensor` or `MalformedBody`.

    `value` is an array, a number, nested lists of them, or the bytes of a PNG or JPEG. Leading axes of length 1 are
    dropped: some robots send a batch of one, or one step of time. Integers become integers of any width, and floating
    point numbers those of any precision, if they are in its range. Nothing else is converted. An image of another size
    is resized if the policy's contract says how (`resizes`). A writable array that needs no conversion is not copied.
    """
    if isinstance(value, str):
        raise InvalidTensor(spec.name, str(spec), "text")
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == np.uint8 and len(spec.shape) > 1:
        value = value.tobytes()  # an encoded image, as OpenCV has it
    if isinstance(value, bytes | bytearray | memoryview):
        value = images.decode(value, spec, resizes)
    if not isinstance(value, np.ndarray):
        value = array_from_lists(value, spec)
    while value.ndim > len(spec.shape) and value.shape[0] == 1:
        value = value[0]
    if resizes and as_png.is_image(spec) and value.shape != spec.shape:
        value = images.resize(value, spec, resizes)
    if value.shape != spec.shape:
        raise InvalidTensor(spec.name, _expected(spec), describe(value)[:200])
    converted = _converted(value, spec)
    return (converted if converted.flags.carray else np.array(converted, order="C"))[None]


def resizes_of(policy: Policy) -> Resize:
    """How the policy's contract says that images are resized."""
    contract = policy.artifact.manifest.environment
    return contract.resize_images if isinstance(contract, Robot) else ""


def encoded_bytes(values: Any) -> int:
    """The bytes of encoded images among `values`."""
    return sum(len(value) for value in values if isinstance(value, bytes))


def _converted(array: Array, spec: TensorSpec) -> Array:
    to = spec.numpy_dtype
    if array.dtype == to and spec.dtype != "bfloat16":
        return array
    kinds = {"i": "iu", "u": "iu"}.get(to.kind, to.kind)
    if array.dtype.kind not in kinds:
        raise InvalidTensor(spec.name, str(spec), describe(array)[:200])
    if array.size and to.kind != "b":
        low, high = spec.limits
        finite = array[np.isfinite(array)] if to.kind == "f" else array
        if finite.size and not (low <= finite.min() and finite.max() <= high):
            raise InvalidTensor(spec.name, f"{low} to {high}", f"{finite.min()} to {finite.max()}")
    return spec.from_wire(spec.to_wire(array.astype(to)))


def _expected(spec: TensorSpec) -> str:
    if not as_png.is_image(spec):
        return str(spec)
    return f"{spec}, rows, columns and colours (the policy's contract does not say how to resize an image)"
