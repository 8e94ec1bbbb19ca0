"""JPEG and PNG images of an observation -> uint8 arrays. Their size is read first, and must be that of the input."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from actserve.core.errors import BodyTooLarge, InvalidRequest, InvalidTensor, MalformedBody
from actserve.core.signature import Array, TensorSpec
from actserve.wire import as_png
from actserve.wire.payload import Body

if TYPE_CHECKING:
    from PIL.Image import Image

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def is_image(data: Any) -> bool:
    """Whether `data` begins as a PNG or a JPEG does."""
    return bytes(data[:8]).startswith((_PNG, _JPEG))


def decode(data: Body, spec: TensorSpec) -> Array:
    """The pixels, (*shape) uint8. Raises `InvalidTensor`, `MalformedBody` or `BodyTooLarge`."""
    if not as_png.is_image(spec):
        raise InvalidTensor(spec.name, str(spec), "an image")
    if not is_image(data):
        raise MalformedBody(f"{spec.name}: expected a PNG or a JPEG; got {len(data):,} other bytes")
    if bytes(data[:8]) == _PNG:
        pixels: Array = as_png.read(data, [spec]).tensors[spec.name][0]
        return pixels
    return as_png.fit(_decode_jpeg(bytes(data), spec), spec).reshape(spec.shape)


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
