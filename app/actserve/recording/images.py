"""Images among the tensors of a recording."""

from __future__ import annotations

import numpy as np

from actserve.core.errors import UsageError
from actserve.core.signature import Array, TensorSpec

CHANNELS = (1, 3)  # grey, RGB
LEAST_SIDE = 8  # pixels; a smaller tensor is numbers


def is_image(spec: TensorSpec) -> bool:
    """Whether items are images: (H, W), (H, W, C) or (C, H, W), grey or RGB; uint8, or floats in colour."""
    if spec.dtype == "uint8":
        return min(_size(spec.shape), default=0) >= LEAST_SIDE
    return spec.dtype == "float32" and 3 in (*spec.shape[:1], *spec.shape[2:]) and min(_size(spec.shape)) >= LEAST_SIDE


def _size(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns of an image; () if `shape` is none."""
    if len(shape) == 3 and shape[2] in CHANNELS:
        return shape[:2]
    if len(shape) == 3 and shape[0] in CHANNELS:
        return shape[1:]
    return shape if len(shape) == 2 else ()


def image_shape(spec: TensorSpec) -> tuple[int, int, int]:
    """The shape of `as_image` of an item."""
    rows, columns = _size(spec.shape)
    return rows, columns, 3


def as_image(array: Array, spec: TensorSpec) -> Array:
    """An item of an image as (H, W, 3) uint8 RGB. Raises `UsageError` for floats that are not in 0 to 1."""
    if spec.dtype != "uint8":
        if not (array.min() >= 0 and array.max() <= 1):
            raise UsageError(
                f"expected the pixels of {spec.name} in 0 to 1; got {array.min():.3g} to {array.max():.3g}, which "
                "cannot be written as an image"
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.ndim == 2:
        array = array[..., None]
    elif array.shape[-1] not in CHANNELS:
        array = np.moveaxis(array, 0, -1)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
