"""msgpack and json-numpy, as robots' clients write them, and as nobody should."""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import tracemalloc
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from actserve.core.errors import InvalidTensor, MalformedBody
from actserve.core.signature import Array, TensorSpec
from actserve.server.protocols.robots import arrays, json_numpy
from actserve.server.protocols.robots.packed import (
    MAX_CONTAINERS,
    MAX_IN_PLACE,
    MAX_KEPT,
    MapPacker,
    of_gr00t,
    of_openpi,
    of_vla_eval,
    pack,
    unpack,
    unpack_in_place,
)
from actserve.server.protocols.robots.values import to_tensor
from tests.fuzzing_robots import SPECS, layout_of

ARRAYS: list[Array] = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array(7, np.int64),
    np.zeros((0, 3), np.uint8),
    np.array([True, False]),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
]


@pytest.mark.parametrize("encode", [of_openpi, of_vla_eval, of_gr00t])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{list(array.shape)}")
def test_arrays_go_both_ways(encode: Any, array: Array) -> None:
    found = unpack(pack({"x": {"y": array}}, encode))["x"]["y"]
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


@pytest.mark.parametrize("encode", [of_openpi, of_vla_eval])
def test_maps_are_packed_as_any_message(encode: Any) -> None:
    packer = MapPacker(encode)
    for size in (0, 1, 7, 255, 256, 300, 70_000):
        for value in (size % 2, 1):
            arrays_in = {
                "bytes": np.full(size, value, np.uint8),
                "floats": np.full((size, 2), value, np.float32),
                "number": np.int64(size),
            }
            timing = {"infer_ms": 0.5, "queue_ms": 0.25}
            content = {**arrays_in, "server_timing": timing, "text": "é", "number again": np.array(size), "seq": size}
            assert packer(content) == pack(content, encode)
    many = {f"name {number}": np.zeros(number, np.uint8) for number in range(2 * MAX_KEPT)}
    assert packer(many) == pack(many, encode)
    assert packer(many) == pack(many, encode)


def in_memory(message: bytes) -> Array:
    return np.frombuffer(bytearray(message), np.uint8)


@pytest.mark.parametrize("encode", [of_openpi, of_vla_eval, of_gr00t])
def test_arrays_are_unpacked_in_place(encode: Any) -> None:
    content = {"list": [1, "two", None, {"x": 2.5}], "arrays": {str(n): array for n, array in enumerate(ARRAYS)}}
    message = in_memory(pack(content, encode))
    found = unpack_in_place(message.data)
    assert found["list"] == content["list"]
    for number, array in enumerate(ARRAYS):
        np.testing.assert_array_equal(found["arrays"][str(number)], array)
        assert np.shares_memory(found["arrays"][str(number)], message) == (array.size > 0)


@pytest.mark.parametrize("values", [[1] * MAX_IN_PLACE, [[[[[1]]]]] * 250, json.loads(200 * "[" + 200 * "]")])
def test_messages_with_many_values_are_not_unpacked_in_place(values: Any) -> None:
    message = msgpack.packb({"x": values})
    assert unpack(message) == {"x": values}
    with pytest.raises(MalformedBody, match="few values"):
        unpack_in_place(memoryview(message))


def test_a_message_of_the_same_layout_is_read_without_unpacking_it() -> None:
    def message(number: int = 0, **other: Any) -> Array:
        content = {
            "image": np.full((8, 8, 3), number, np.uint8),
            "state": np.full(3, number / 2, np.float32),
            "word": 7,
            "prompt": "pick up",
        }
        return in_memory(pack(content | other, of_openpi))

    layout = layout_of(message())
    for number in range(5):
        found = layout.read(message(number))
        assert found is not None
        assert (found["image"] == number).all()
        assert to_tensor(found["state"], SPECS["state"]).tolist() == [[number / 2] * 3]
        assert found["word"] == 7
    other_layouts: list[dict[str, Any]] = [
        {"prompt": "put it "},
        {"prompt": "pick it up"},
        {"word": 8},
        {"word": np.array(7)},
        {"state": np.zeros(3, np.int32)},
        {"image": np.zeros((3, 8, 8), np.uint8)},
        {"more": 1},
    ]
    for other in other_layouts:
        assert layout.read(message(**other)) is None


def test_a_layout_has_other_values_than_arrays_as_they_are() -> None:
    content = {
        "image": np.zeros((8, 8, 3), np.uint8),
        "state": [1, 2.5, 3],
        "word": {b"__npgeneric__": True, b"data": 7, b"dtype": "<i2"},
        "on": np.array(True),
        "prompt": np.zeros((0, 3), np.uint8),
    }
    layout = layout_of(in_memory(pack(content, of_openpi)))
    found = layout.read(in_memory(pack(content | {"image": np.ones((8, 8, 3), np.uint8)}, of_openpi)))
    assert found is not None
    assert (found["image"] == 1).all()
    assert (found["state"], found["word"], found["on"]) == ([1, 2.5, 3], np.int16(7), True)
    column_major = np.asfortranarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    file = io.BytesIO()
    np.save(file, column_major)
    message = pack({"image": {"__ndarray_class__": True, "as_npy": file.getvalue()}}, of_gr00t)
    assert layout_of(in_memory(message)).fixed_bytes == len(message)


def test_the_other_forms_of_clients() -> None:
    values = {
        "scalar": {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"},
        "flag": {b"__npgeneric__": True, b"data": True, b"dtype": "|b1"},
        "image": {"__image__": True, "format": "png", "data": b"\x89PNG", "shape": [1, 1, 3]},
        "raw": {"__image__": True, "format": "raw", "data": b"abc", "dtype": "|u1", "shape": [1, 1, 3]},
        "msgpack_numpy": {b"nd": True, b"type": b"<f4", b"kind": b"", b"shape": [1], b"data": struct.pack("<f", 2)},
        "text": "pick up",
        "none": None,
    }
    found = unpack(msgpack.packb(values))
    assert (found["scalar"], found["scalar"].dtype, found["flag"].dtype) == (1.5, np.float32, np.bool_)
    assert (found["image"], found["raw"].shape, found["msgpack_numpy"].tolist()) == (b"\x89PNG", (1, 1, 3), [2.0])
    assert (found["text"], found["none"]) == ("pick up", None)


def marked(**fields: Any) -> bytes:
    message: bytes = msgpack.packb({b"__ndarray__": True} | {name.encode(): value for name, value in fields.items()})
    return message


def npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (b"", "msgpack"),
        (b"\xc1", "msgpack"),
        (msgpack.packb({"x": 1}) + b"more", "msgpack"),
        (msgpack.packb({"x": 1})[:-1], "msgpack"),
        (msgpack.packb({1: 2}), "msgpack"),
        (b"\xa2\xff\xfe", "msgpack"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "msgpack|extension"),
        (marked(data=b"abcd", dtype="<f4", shape=[2]), r"expected 8 bytes for <f4 of shape \(2,\); got 4"),
        (marked(data=b"abcd", dtype="|O", shape=[1]), r"expected a dtype of .*; got '\|O'"),
        (marked(data=b"abcd", dtype="<U1", shape=[1]), "expected a dtype"),
        (marked(data=b"abcd", dtype="f4,f4", shape=[1]), "expected a dtype"),
        (marked(data=b"abcd", dtype=["<f4"], shape=[1]), "expected a dtype"),
        (marked(data="abcd", dtype="|u1", shape=[4]), "expected the bytes of an array; got str"),
        (marked(data=b"abcd", dtype="|u1", shape=[-4]), "expected a shape"),
        (marked(data=b"abcd", dtype="|u1", shape=[2.0, 2]), "expected a shape"),
        (marked(data=b"", dtype="|u1", shape=[0] * 17), "expected a shape"),
        (marked(data=b"", dtype="|u1", shape=[2**60, 2**60]), "expected a shape"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 2**40, b"dtype": "<i4"}), "number of the dtype"),
        (msgpack.packb({b"__npgeneric__": True, b"data": b"x", b"dtype": "|O"}), "number of the dtype"),
        (msgpack.packb({"__image__": True, "format": "png", "data": [1]}), "the bytes of an image"),
        (msgpack.packb({"__ndarray_class__": True, "as_npy": pickle.dumps(1)}), "expected a .npy file"),
        (msgpack.packb({"__ndarray_class__": True, "as_npy": npy(np.array([None]))}), "expected a dtype"),
        (msgpack.packb({"__ndarray_class__": True, "as_npy": npy(np.zeros(3))[:-1]}), "expected 24 bytes"),
        (msgpack.packb({"__ndarray_class__": True, "as_npy": "x"}), "the bytes of a .npy file; got str"),
        (msgpack.packb([[]] * 4000 + [[]] * 97), "msgpack"),
        (msgpack.packb([[[]] * 4000, [[]] * 4000]), f"at most {MAX_CONTAINERS:,} lists and maps"),
    ],
)
def test_what_is_no_message_is_refused(message: bytes, error: str) -> None:
    with pytest.raises(MalformedBody, match=error):
        unpack(message)


def test_nothing_is_allocated_that_is_only_announced() -> None:
    """A million lists in each other, each of 4 billion values; a map of 4 billion; an array of 4 GB."""
    messages = [
        b"\xdd\xff\xff\xff\xff" * 200_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 1_000_000,
    ]
    messages.append(b"\xdc\x0f\xff" * 300_000)  # lists of 4,095, within the limit
    tracemalloc.start()
    for message in messages:
        with pytest.raises(MalformedBody):
            unpack(message)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20


@given(st.binary(max_size=200))
def test_no_message_does_more_than_be_refused(message: bytes) -> None:
    with suppress(MalformedBody):
        unpack(message)


def test_a_npy_file_as_numpy_writes_it() -> None:
    for array in ARRAYS:
        np.testing.assert_array_equal(arrays.from_npy(npy(array)), array)
        np.testing.assert_array_equal(np.load(io.BytesIO(arrays.to_npy(array))), array)


def as_json(array: Array) -> dict[str, Any]:
    return {
        "__numpy__": base64.b64encode(array.tobytes()).decode(),
        "dtype": np.lib.format.dtype_to_descr(array.dtype),
        "shape": list(array.shape),
    }


def test_json_numpy_documents_once_and_twice_encoded() -> None:
    document = {"observation": {"state": as_json(ARRAYS[0]), "word": "cup"}}
    once = json.dumps(document)
    for text, twice in ((once, False), (json.dumps(once), True), (json.dumps({"encoded": once}), True)):
        found, is_twice = json_numpy.parse(text.encode())
        np.testing.assert_array_equal(found["observation"]["state"], ARRAYS[0])
        assert (found["observation"]["word"], is_twice) == ("cup", twice)
    assert json_numpy.as_json(ARRAYS[0]) == {**as_json(ARRAYS[0]), "shape": (2, 3)}


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "expected JSON"),
        ('{"encoded": "[1"}', "expected JSON"),
        (json.dumps({"x": {"__numpy__": "???", "dtype": "<f4", "shape": [1]}}), "base64"),
        (json.dumps({"x": {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}}), "expected a dtype"),
        (json.dumps({"x": {"__numpy__": "AAAA", "dtype": [["a", "<f4"]], "shape": [1]}}), "expected a dtype"),
        (json.dumps({"x": {"__numpy__": "AAAA", "dtype": "<f4", "shape": [1]}}), "expected 4 bytes"),
    ],
)
def test_what_is_no_json_numpy_is_refused(document: str, error: str) -> None:
    with pytest.raises(MalformedBody, match=error):
        json_numpy.parse(document.encode())


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        ("", b'{"x": {"__numpy__": ""}}', True),
        ("application/json", b'"{\\"x\\": {\\"__numpy__\\": 1}}"', True),
        ("application/json; charset=utf-8", b"__numpy__", True),
        ("application/json", b'{"pixels": [1]}', False),
        ("application/octet-stream", b"__numpy__", False),
    ],
)
def test_a_body_is_told_by_its_content(content_type: str, body: bytes, expected: bool) -> None:
    assert json_numpy.JsonNumpyBodies().recognises(content_type, memoryview(body)) == expected


CAMERA = TensorSpec("image", "uint8", (24, 32, 3))


def encoded(pixels: Array, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pillow(pixels: Array, rows: int, columns: int) -> Array:
    return np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR))


def test_an_image_is_resized_as_the_contract_says() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    padded = np.zeros((24, 32, 3), np.uint8)
    padded[:, 4:28] = pillow(pixels, 24, 24)
    for value in (pixels, encoded(pixels, "PNG"), pixels[None]):
        np.testing.assert_array_equal(to_tensor(value, CAMERA, "pad")[0], padded)
        np.testing.assert_array_equal(to_tensor(value, CAMERA, "stretch")[0], pillow(pixels, 24, 32))
        with pytest.raises(InvalidTensor):
            to_tensor(value, CAMERA)
    assert to_tensor(encoded(pixels, "JPEG"), CAMERA, "pad").shape == (1, 24, 32, 3)
    tall = pixels[:, :12]
    assert to_tensor(tall, CAMERA, "pad")[0, :, :13].max() == 0, "black margins on both sides"
    grey = TensorSpec("image", "uint8", (24, 32))
    np.testing.assert_array_equal(to_tensor(pixels[..., 0], grey, "stretch")[0], pillow(pixels[..., 0], 24, 32))
    right = pixels[:24, :32].copy()
    np.testing.assert_array_equal(to_tensor(right, CAMERA, "pad")[0], right)


@pytest.mark.parametrize("shape", [(3000, 3000, 3), (0, 5, 3), (5, 5, 4), (5, 5)])
def test_what_cannot_be_resized_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTensor, match="of another size up to 4,194,304 pixels"):
        to_tensor(np.zeros(shape, np.uint8), CAMERA, "pad")


def test_numbers_are_no_image() -> None:
    with pytest.raises(InvalidTensor, match="of another size"):
        to_tensor(np.zeros((5, 5, 3), np.float32), CAMERA, "pad")


def test_a_large_encoded_image_is_refused_by_its_head() -> None:
    with pytest.raises(InvalidTensor, match="at most 4,194,304 pixels"):
        to_tensor(encoded(np.zeros((3000, 3000, 3), np.uint8), "PNG"), CAMERA, "pad")
    with pytest.raises(MalformedBody, match="cannot be read"):
        to_tensor(b"\x89PNG\r\n\x1a\n" + bytes(40), CAMERA, "pad")
