"""image/png: one screen, for a policy whose single observation is uint8[H, W, 3], or uint8[H, W(, 1)] in grey.

Any PNG is accepted if its decoded pixels fit the observation exactly: palettes, fewer bits, a fully opaque alpha
channel, a grey image for a colour observation, and a colour image with only grey pixels for a grey observation.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from actserve.core.errors import BodyTooLarge, InvalidTensor, MalformedBody, UnsupportedContentType
from actserve.core.signature import Array, TensorSpec
from actserve.wire.payload import JSON, PNG, RAW, SAFETENSORS, Body, Payload

if TYPE_CHECKING:
    from PIL.Image import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OVERHEAD_BYTES = 64 << 10  # allowed on top of the pixels: a palette, a colour profile, text
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: grey, RGB, palette, grey with alpha, RGBA
_OTHER_TYPES = [RAW, JSON, SAFETENSORS]


def read(body: Body, specs: Sequence[TensorSpec]) -> Payload:
    if len(specs) != 1 or not is_image(specs[0]):
        inputs = ", ".join(f"{spec.name} {spec}" for spec in specs)
        raise UnsupportedContentType(f"{PNG}, which carries one image; this policy takes {inputs}", _OTHER_TYPES)
    spec = specs[0]
    limit_bytes = max_bytes(spec)
    if len(body) > limit_bytes:
        raise BodyTooLarge(limit_bytes, len(body))
    png, expanded = _pixel_chunks(bytes(body), spec)
    pixels = _plain_pixels(png, expanded)
    if pixels is None:
        pixels = _decode(png, spec)
    return Payload({spec.name: fit(pixels, spec).reshape(1, *spec.shape)}, batched=False)


def is_image(spec: TensorSpec) -> bool:
    """Whether a tensor is an image: uint8[H, W, 3], or uint8[H, W(, 1)] in grey."""
    return spec.dtype == "uint8" and (len(spec.shape) == 2 or (len(spec.shape) == 3 and spec.shape[2] in (1, 3)))


def max_bytes(spec: TensorSpec) -> int:
    """The largest encoded image for `spec`."""
    height, width = spec.shape[:2]
    return 4 * height * (width + 1) + _OVERHEAD_BYTES


def _pixel_chunks(body: bytes, spec: TensorSpec) -> tuple[bytes, bytes]:
    """A PNG with only the chunks that define the pixels, and the decompressed rows. Their size and all checksums have
    been checked.

    Only this reaches Pillow, which would read missing rows as black, and decompress text chunks without a bound.
    """
    kept, compressed, size = [_SIGNATURE], list[bytes](), 0
    for number, (kind, chunk) in enumerate(_chunks(body)):
        if (kind == b"IHDR") != (number == 0):
            raise MalformedBody("expected a PNG, which has one header chunk, at its start; got something else")
        if kind == b"IHDR":
            size = _expanded_bytes(chunk[8:-4], spec)
        if kind == b"IDAT":
            compressed.append(chunk[8:-4])
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(chunk)
    stream = zlib.decompressobj()
    try:
        expanded = stream.decompress(b"".join(compressed), size + 1)
    except zlib.error as error:
        raise MalformedBody(f"expected a PNG; its pixels cannot be decompressed: {error}") from None
    if len(expanded) != size or not stream.eof or stream.unused_data:
        raise MalformedBody(f"expected a PNG of {size:,} bytes of pixels, filters included; it has more or fewer")
    return b"".join(kept), expanded


def _chunks(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, chunk) of each chunk. The chunk is complete: length, kind, data, checksum."""
    if not body.startswith(_SIGNATURE):
        raise MalformedBody("expected a PNG; got something else")
    at, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        try:
            length, kind = struct.unpack_from(">I4s", body, at)
            (checksum,) = struct.unpack_from(">I", body, at + 8 + length)
        except struct.error:
            raise MalformedBody(f"expected a whole PNG; it ends after {len(body):,} bytes") from None
        if zlib.crc32(body[at + 4 : at + 8 + length]) != checksum:
            raise MalformedBody(f"expected a PNG; its chunk at byte {at} is damaged")
        yield kind, body[at : at + 12 + length]
        at += 12 + length
    if at != len(body):
        raise MalformedBody(f"expected one PNG; got {len(body) - at:,} bytes more")


def _expanded_bytes(header: bytes, spec: TensorSpec) -> int:
    """The decompressed size of an image with this header. A row is one filter byte and its packed pixels."""
    if len(header) != 13:
        raise MalformedBody(f"expected a PNG header of 13 bytes; got {len(header)}")
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if (height, width) != spec.shape[:2]:
        expected = f"an image of {spec.shape[0]} rows and {spec.shape[1]} columns"
        raise InvalidTensor(spec.name, expected, f"{height} rows and {width} columns")
    if bits > 8:
        raise InvalidTensor(spec.name, "at most 8 bits a channel", f"{bits}")
    if interlaced:
        raise InvalidTensor(spec.name, "an image that is not interlaced", "an interlaced one")
    if colour not in _CHANNELS:
        raise MalformedBody(f"expected a PNG colour type of {', '.join(map(str, _CHANNELS))}; got {colour}")
    return int(height * (1 + (width * bits * _CHANNELS[colour] + 7) // 8))


def _plain_pixels(png: bytes, expanded: bytes) -> Array | None:
    """(H, W, 1 or 3) of a grey or RGB image with 8 bits a channel, whose rows have filter 0 (none) or 1 (differences to
    the pixel on the left), as OpenCV writes them. None: Pillow decodes the others, which takes three times as long.
    """
    width, height, bits, colour = struct.unpack_from(">IIBB", png, len(_SIGNATURE) + 8)
    if bits != 8 or colour not in (0, 2) or b"tRNS" in png:
        return None
    channels = _CHANNELS[colour]
    rows = np.frombuffer(expanded, np.uint8).reshape(height, 1 + width * channels)
    filters = rows[:, 0]
    if filters.max() > 1:
        return None
    pixels = rows[:, 1:].copy().reshape(height, width, channels)
    differences = filters == 1
    if differences.any():
        pixels[differences] = np.add.accumulate(pixels[differences], axis=1, dtype=np.uint8)
    return pixels


def _decode(png: bytes, spec: TensorSpec) -> Array:
    """(H, W, 1 or 3), by Pillow. Raises `MalformedBody`, and `InvalidTensor` for transparent pixels."""
    try:
        from PIL.PngImagePlugin import PngImageFile
    except ModuleNotFoundError:
        needs = f'{PNG}, which needs Pillow on the service\'s host: pip install "actserve[png]"'
        raise UnsupportedContentType(needs, _OTHER_TYPES) from None
    try:
        image: Image = PngImageFile(io.BytesIO(png))
        image.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise MalformedBody(f"expected a PNG; its pixels cannot be decoded: {error}"[:300]) from None
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            raise InvalidTensor(spec.name, "opaque pixels", "transparent ones")
    if image.mode in ("L", "1"):
        return np.array(image.convert("L"))[..., None]
    return np.array(image.convert("RGB"))


def fit(pixels: Array, spec: TensorSpec) -> Array:
    """(H, W, 3), or (H, W, 1) for a grey observation. Raises `InvalidTensor` for colours that it cannot have."""
    wanted, channels = spec.shape[2:] or (1,), pixels.shape[2]
    if wanted == (3,):
        return pixels if channels == 3 else np.repeat(pixels, 3, axis=2)
    if channels == 3 and (pixels != pixels[..., :1]).any():
        raise InvalidTensor(spec.name, "a grey image", "a coloured one")
    return np.ascontiguousarray(pixels[..., :1])
