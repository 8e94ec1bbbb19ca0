from __future__ import annotations

import io
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from actserve import wire
from actserve.core.errors import (
    BodyTooLarge,
    InvalidRequest,
    InvalidTensor,
    MalformedBody,
    UnsupportedContentType,
)
from actserve.core.signature import Array, Signature, TensorSpec
from tests.tensors import ACTION

RGB = TensorSpec("pixels", "uint8", (6, 5, 3))
GREY = TensorSpec("pixels", "uint8", (6, 5))
GREY_1 = TensorSpec("pixels", "uint8", (6, 5, 1))
RNG = np.random.default_rng(0)
COLOURED = RGB.sample(RNG, 1)[0]
PLAIN = GREY.sample(RNG, 1)[0]


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def by_hand(width: int, height: int, bits: int, colour: int, pixels: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def decode(content: bytes, spec: TensorSpec = RGB) -> wire.Payload:
    return wire.decode(wire.PNG, content, Signature((spec,), (ACTION,), 8))


def shown(content: bytes, spec: TensorSpec = RGB) -> Array:
    payload = decode(content, spec)
    assert not payload.batched
    assert payload.tensors["pixels"].flags.writeable  # some runtimes copy arrays that are not
    screen: Array = payload.tensors["pixels"][0]
    return screen


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([(), (1,), (3,)]), st.integers(0, 9), st.booleans())
def test_a_screen_comes_as_it_was(
    height: int, width: int, channels: tuple[int, ...], level: int, optimize: bool
) -> None:
    spec = TensorSpec("pixels", "uint8", (height, width, *channels))
    screen = spec.sample(np.random.default_rng(level), 1)[0]
    image = Image.fromarray(screen if channels == (3,) else screen.reshape(height, width))
    np.testing.assert_array_equal(shown(png(image, compress_level=level, optimize=optimize), spec), screen)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([(0, 1), (2, 3)]), st.sampled_from([1, 2, 4]), st.data())
def test_filtered_rows_are_read_as_pillow_reads_them(
    height: int, width: int, kind: tuple[int, int], filters: int, data: st.DataObject
) -> None:
    colour, channels = kind
    row = st.binary(min_size=width * channels, max_size=width * channels)
    rows = [bytes([data.draw(st.integers(0, filters))]) + data.draw(row) for _ in range(height)]
    content = by_hand(width, height, 8, colour, b"".join(rows))
    spec = TensorSpec("pixels", "uint8", (height, width, 3))
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(shown(content, spec), expected)


def test_forms_of_the_same_pixels() -> None:
    few = RNG.integers(0, 3, (6, 5), np.uint8)
    palette = Image.fromarray(few, "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)[few]
    for bits in (2, 4, 8):
        np.testing.assert_array_equal(shown(png(palette, bits=bits)), expected)
    opaque = Image.fromarray(np.dstack([COLOURED, np.full((6, 5), 255, np.uint8)]))
    np.testing.assert_array_equal(shown(png(opaque)), COLOURED)
    np.testing.assert_array_equal(shown(png(Image.fromarray(PLAIN))), np.repeat(PLAIN[..., None], 3, 2))


def test_forms_of_the_same_grey() -> None:
    as_colour = Image.fromarray(np.repeat(PLAIN[..., None], 3, 2))
    with_alpha = Image.fromarray(np.dstack([PLAIN, np.full((6, 5), 255, np.uint8)]), "LA")
    for image in (Image.fromarray(PLAIN), as_colour, with_alpha):
        np.testing.assert_array_equal(shown(png(image), GREY), PLAIN)
        np.testing.assert_array_equal(shown(png(image), GREY_1)[..., 0], PLAIN)
    two_bits = by_hand(5, 6, 2, 0, (b"\0" + bytes([0b00011011, 0b11000000])) * 6)
    assert shown(two_bits, GREY)[0].tolist() == [0, 85, 170, 255, 255]
    one_bit = by_hand(5, 6, 1, 0, (b"\0" + bytes([0b01010000])) * 6)
    assert shown(one_bit, GREY)[0].tolist() == [0, 255, 0, 255, 0]


INTERLACED = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 6, 8, 2, 0, 0, 1))


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        (png(Image.new("RGB", (6, 5))), RGB, "an image of 6 rows and 5 columns; got 5 rows and 6 columns"),
        (by_hand(5, 6, 16, 2, bytes(31 * 6)), RGB, "at most 8 bits a channel; got 16"),
        (INTERLACED, RGB, "not interlaced; got an interlaced one"),
        (png(Image.new("RGBA", (5, 6))), RGB, "opaque pixels; got transparent ones"),
        (png(Image.new("RGB", (5, 6)), transparency=(0, 0, 0)), RGB, "opaque pixels"),
        (png(Image.new("L", (5, 6)), transparency=0), GREY, "opaque pixels"),
        (png(Image.new("P", (5, 6)), transparency=b"\x10"), RGB, "opaque pixels"),
        (png(Image.new("RGB", (5, 6), (1, 2, 3))), GREY, "a grey image; got a coloured one"),
    ],
)
def test_pixels_that_would_have_to_change_are_refused(content: bytes, spec: TensorSpec, message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        decode(content, spec)


GOOD = png(Image.fromarray(COLOURED))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a PNG; got something else"),
        (b"\xff\xd8\xff\xe0JFIF", "expected a PNG; got something else"),
        (GOOD[:8], "expected a whole PNG; it ends after 8 bytes"),
        (GOOD[:-13], "expected a whole PNG"),
        (GOOD[:40] + bytes([GOOD[40] ^ 1]) + GOOD[41:], "chunk at byte 33 is damaged"),
        (GOOD + b"x", "expected one PNG; got 1 bytes more"),
        (GOOD[:8] + chunk(b"IEND", b""), "one header chunk, at its start"),
        (GOOD[:8] + chunk(b"IHDR", b"") + GOOD[33:], "header of 13 bytes"),
        (GOOD[:33] + GOOD[8:], "one header chunk, at its start"),  # a second header, which could have another size
        (by_hand(5, 6, 8, 2, bytes(16 * 5)), "96 bytes of pixels, filters included"),
        (by_hand(5, 6, 8, 2, bytes(16 * 7)), "96 bytes of pixels, filters included"),
        (by_hand(5, 6, 8, 2, b"")[:-12] + chunk(b"IDAT", b"x") + chunk(b"IEND", b""), "96 bytes of pixels"),
        (GOOD[:33] + chunk(b"IDAT", b"xxxx") + chunk(b"IEND", b""), "cannot be decompressed"),
        (by_hand(5, 6, 8, 7, bytes(16 * 6)), "colour type of 0, 2, 3, 4, 6; got 7"),
        (by_hand(5, 6, 3, 0, bytes(3 * 6)), "pixels cannot be decoded"),  # no such number of bits
        (by_hand(5, 6, 8, 2, b"\x09" * 16 * 6), "pixels cannot be decoded"),  # no such filter
        (GOOD[:33] + chunk(b"IEND", b""), "96 bytes of pixels"),
    ],
)
def test_what_is_not_a_png_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(MalformedBody, match=message):
        decode(content)


def test_nothing_expands_beyond_the_screen() -> None:
    bomb = zlib.compress(bytes(50 << 20))
    text = PngInfo()
    text.add_text("comment", "x" * 900_000, zip=True)
    by_text = png(Image.fromarray(COLOURED), pnginfo=text)
    by_profile = GOOD[:33] + chunk(b"iCCP", b"p\0\0" + bomb) + GOOD[33:]
    by_pixels = GOOD[:33] + chunk(b"IDAT", bomb) + chunk(b"IEND", b"")
    by_size = by_hand(60_000, 60_000, 8, 2, b"")
    tracemalloc.start()
    for content in (by_text, by_profile):
        assert decode(content).size == 1
    with pytest.raises(MalformedBody, match="it has more or fewer"):
        decode(by_pixels)
    with pytest.raises(InvalidTensor, match="got 60000 rows"):
        decode(by_size)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(BodyTooLarge):
        decode(GOOD[:33] + chunk(b"tEXt", bytes(100_000)) + GOOD[33:])


@pytest.mark.parametrize(
    "observations",
    [
        (TensorSpec("x", "float32", (6, 5, 3)),),
        (TensorSpec("x", "uint8", (3, 6, 5)),),
        (TensorSpec("x", "uint8", (4,)),),
        (RGB, GREY),
    ],
)
def test_policies_that_take_no_image(observations: tuple[TensorSpec, ...]) -> None:
    signature = Signature(observations, (ACTION,), 8)
    with pytest.raises(UnsupportedContentType, match="one image; this policy takes"):
        wire.decode(wire.PNG, GOOD, signature)


def test_without_pillow_the_answer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.PngImagePlugin", None)
    with pytest.raises(UnsupportedContentType, match=r'pip install "actserve\[png\]"'):
        decode(GOOD)


@given(
    st.lists(st.tuples(st.integers(8, len(GOOD)), st.integers(0, 8), st.binary(max_size=8)), max_size=3), st.booleans()
)
def test_any_bytes_are_a_screen_or_a_clear_refusal(edits: list[tuple[int, int, bytes]], mend: bool) -> None:
    content = GOOD
    for at, removed, added in edits:
        content = content[:at] + added + content[at + removed :]
    try:
        decode(_with_checksums(content) if mend else content)
    except InvalidRequest as error:
        assert "expected" in error.message


def _with_checksums(content: bytes) -> bytes:
    """The same chunks with right checksums, so that the decoder gets to see them."""
    mended, at = content[:8], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        mended += chunk(content[at + 4 : at + 8], content[at + 8 : at + 8 + length])
        at += 12 + length
    return mended
