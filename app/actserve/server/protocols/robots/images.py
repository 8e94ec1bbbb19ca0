"""JPEG and PNG images of an observation -> uint8 arrays.

Their size is read first, and must be that of the input, unless the policy's contract says how images are resized.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actserve.core.errors import BodyTooLarge, InvalidRequest, InvalidTensor, MalformedBody
from actserve.core.robot import Resize
from actserve.core.signature import Array, TensorSpec, describe
from actserve.wire import as_png
from actserve.wire.payload import Body

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 4 << 20  # of an image that is resized
_BILINEAR = 2  # Pillow's number for the filter
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def is_image(data: Any) -> bool:
    """Whether `data` begins as a PNG or a JPEG does."""
    return bytes(data[:8]).startswith((_PNG, _JPEG))


def decode(data: Body, spec: TensorSpec, resizes: Resize = "") -> Array:
    """The pixels, (*shape) uint8. Raises `InvalidTensor`, `MalformedBody` or `BodyTooLarge`.

    With `resizes`, an image may have another size, up to `MOST_PIXELS`.
    """
    if not as_png.is_image(spec):
        raise InvalidTensor(spec.name, str(spec), "an image")
    if not is_image(data):
        raise MalformedBody(f"{spec.name}: expected a PNG or a JPEG; got {len(data):,} other bytes")
    if resizes:
        spec = replace(spec, shape=(*_size_of(bytes(data), spec), *spec.shape[2:]))
    if bytes(data[:8]) == _PNG:
        pixels: Array = as_png.read(data, [spec]).tensors[spec.name][0]
        return pixels
    return as_png.fit(_decode_jpeg(bytes(data), spec), spec).reshape(spec.shape)


def resize(pixels: Array, spec: TensorSpec, how: Resize) -> Array:
    """(H, W, C) uint8 of any size -> (*shape), with Pillow's bilinear filter. Raises `InvalidTensor`."""
    fits = pixels.dtype == np.uint8 and pixels.ndim == len(spec.shape) and pixels.shape[2:] == spec.shape[2:]
    if not fits or not 0 < pixels.shape[0] * pixels.shape[1] <= MOST_PIXELS:
        expected = f"an image as {spec}, of another size up to {MOST_PIXELS:,} pixels"
        raise InvalidTensor(spec.name, expected, describe(pixels)[:200])
    rows, columns = spec.shape[:2]
    scale = (rows / pixels.shape[0], columns / pixels.shape[1])
    if how == "pad":
        scale = (min(scale), min(scale))
    size = [max(1, round(length * factor)) for length, factor in zip(pixels.shape[:2], scale, strict=True)]
    image = _pillow(spec).fromarray(np.squeeze(pixels, 2) if pixels.shape[2:] == (1,) else pixels)
    found = np.asarray(image.resize((size[1], size[0]), _BILINEAR)).reshape(*size, *spec.shape[2:])
    fitted = np.zeros(spec.shape, np.uint8)
    top, left = (rows - size[0]) // 2, (columns - size[1]) // 2
    fitted[top : top + size[0], left : left + size[1]] = found
    return fitted


def _size_of(data: bytes, spec: TensorSpec) -> tuple[int, int]:
    """(rows, columns) of an encoded image, from its head. Raises `InvalidTensor` or `MalformedBody`."""
    try:
        width, height = _pillow(spec).open(io.BytesIO(data), formats=("PNG", "JPEG")).size
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise MalformedBody(f"{spec.name}: expected a PNG or a JPEG; it cannot be read: {error}"[:300]) from None
    if height * width > MOST_PIXELS:
        raise InvalidTensor(spec.name, f"an image of at most {MOST_PIXELS:,} pixels", f"{height} x {width}")
    return height, width


def _pillow(spec: TensorSpec) -> Any:
    """Pillow's module `Image`. Raises `InvalidRequest` without it."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise InvalidRequest(
            f'{spec.name}: this image needs Pillow on the service\'s host: pip install "actserve[png]"'
        ) from None
    return Image


def _decode_jpeg(data: bytes, spec: TensorSpec) -> Array:
    """(H, W, 1 or 3). Only what a camera writes: baseline, grey or colour."""
    limit_bytes = as_png.max_bytes(spec)
    if len(data) > limit_bytes:
        raise BodyTooLarge(limit_bytes, len(data))
    try:
        from PIL.JpegImagePlugin import JpegImageFile
    except ModuleNotFoundError:
        raise InvalidRequest(
            f'{spec.name}: a JPEG needs Pillow on the service\'s host: pip install "actserve[png]"'
        ) from None
    try:
        image: Image = JpegImageFile(io.BytesIO(data))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise MalformedBody(f"{spec.name}: expected a JPEG; it cannot be decoded: {error}"[:300]) from None
    if (image.height, image.width) != spec.shape[:2]:
        expected = f"an image of {spec.shape[0]} rows and {spec.shape[1]} columns"
        raise InvalidTensor(spec.name, expected, f"{image.height} rows and {image.width} columns")
    if image.mode not in ("L", "RGB") or image.info.get("progressive"):
        raise InvalidTensor(spec.name, "a baseline JPEG, grey or in colour", "another kind of JPEG")
    try:
        image.load()
    except Exception as error:
        raise MalformedBody(f"{spec.name}: expected a JPEG; it cannot be decoded: {error}"[:300]) from None
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
