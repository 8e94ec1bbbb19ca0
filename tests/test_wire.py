from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actserve import wire
from actserve.core.errors import (
    InvalidRequest,
    InvalidTensor,
    MalformedBody,
    NotAcceptable,
    UnsupportedContentType,
)
from actserve.core.signature import Array, Signature, State, TensorSpec

PIXELS = TensorSpec("pixels", "uint8", (4, 3))
ACTION = TensorSpec("action", "int64", ())
ONE = Signature((PIXELS,), (ACTION,), 256)
RECURRENT = Signature((PIXELS,), (ACTION,), 256, (State(TensorSpec("h", "float32", (2,)), "h_next"),), is_init=True)
TWO = Signature((PIXELS, TensorSpec("speed", "float32", (2,)), TensorSpec("on", "bool", ())), (ACTION,), max_batch=256)


def b64(array: Array) -> dict[str, object]:
    return {"dtype": str(array.dtype), "shape": list(array.shape), "b64": base64.b64encode(array.tobytes()).decode()}


def decode_json(document: object, signature: Signature = ONE) -> wire.Payload:
    return wire.decode(wire.JSON, json.dumps(document).encode(), signature)


@pytest.mark.parametrize(
    ("pixels", "flag", "expected", "batched"),
    [
        ((4, 3), True, [True], False),
        ((4, 3), [True], [True], False),  # as InitTracker gives it
        ((2, 4, 3), [True, False], [True, False], True),
        ((2, 4, 3), [[True], [False]], [True, False], True),
    ],
)
def test_the_reset_flag_may_have_torchrls_shape(
    pixels: tuple[int, ...], flag: object, expected: list[bool], batched: bool
) -> None:
    document = {"pixels": np.zeros(pixels, np.uint8).tolist(), "is_init": flag}
    payload = decode_json(document, RECURRENT)
    assert payload.tensors["is_init"].tolist() == expected
    assert payload.batched == batched


@pytest.mark.parametrize("count", [1, 2, 7])
def test_raw_bytes_are_one_item_or_a_batch(count: int) -> None:
    batch = PIXELS.sample(np.random.default_rng(0), count)
    payload = wire.decode(wire.RAW, batch.tobytes(), ONE)
    np.testing.assert_array_equal(payload.tensors["pixels"], batch)
    assert payload.batched == (count > 1)
    assert payload.size == count


@pytest.mark.parametrize("length", [0, 1, 11, 13, 25])
def test_raw_bytes_of_a_wrong_length_are_refused(length: int) -> None:
    with pytest.raises(InvalidTensor, match=rf"expected 12 bytes for one item .* got {length} bytes"):
        wire.decode(wire.RAW, bytes(length), ONE)


def test_raw_bytes_cannot_carry_several_tensors() -> None:
    with pytest.raises(UnsupportedContentType, match="pixels, speed, on"):
        wire.decode(wire.RAW, bytes(12), TWO)


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types_are_refused(content_type: str) -> None:
    with pytest.raises(UnsupportedContentType, match="application/octet-stream"):
        wire.decode(content_type, bytes(12), ONE)


def test_json_lists_and_base64_say_the_same() -> None:
    item = PIXELS.sample(np.random.default_rng(0), 1)[0]
    for value in (item.tolist(), b64(item)):
        payload = decode_json({"pixels": value})
        np.testing.assert_array_equal(payload.tensors["pixels"], item[None])
        assert not payload.batched


def test_json_carries_several_tensors_and_batches() -> None:
    document = {"pixels": np.zeros((2, 4, 3), int).tolist(), "speed": [[0, 0.5], [1, 2]], "on": [True, False]}
    payload = decode_json(document, TWO)
    assert payload.batched
    assert {name: (a.shape, str(a.dtype)) for name, a in payload.tensors.items()} == {
        "pixels": ((2, 4, 3), "uint8"),
        "speed": ((2, 2), "float32"),
        "on": ((2,), "bool"),
    }


def test_a_scalar_is_one_item() -> None:
    payload = decode_json({"pixels": np.zeros((4, 3), int).tolist(), "speed": [0, 1], "on": True}, TWO)
    assert not payload.batched
    assert payload.tensors["on"].shape == (1,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1, 2], [3]], "lists of unequal length"),
        ([[256, 0, 0]] * 4, "expected 0 to 255; got 0 to 256"),
        ([[-1, 0, 0]] * 4, "expected 0 to 255; got -1 to 0"),
        ([[0.5, 0, 0]] * 4, "expected integers; got fractions"),
        ([["a", "b", "c"]] * 4, "expected integers; got text"),
        ([[True] * 3] * 4, "expected integers; got booleans"),
        ([[None] * 3] * 4, "expected integers; got mixed values"),
        (None, "expected integers; got mixed values"),
        ([[0, 0, 0]], r"expected uint8\[4, 3\], or a batch of them; got uint8\[1, 3\]"),
        ([], r"expected uint8\[4, 3\], or a batch of them; got uint8\[0\]"),
        ([[True, 1, 0]] * 4, "expected integers; got booleans"),
        ([[2**64, 0, 0]] * 4, "expected integers; got one of more than 64 bits"),
        (["x" * 100_000] + [1] * 5000, "expected integers; got text"),  # 2 GB, if all were as long as the longest
        ([1] * 1000 + [[]] * 1000, "mixed values"),
        ({"b64": "AAAA"}, "nested lists or"),
        ({"dtype": "int8", "shape": [4, 3], "b64": ""}, "dtype 'uint8'; got 'int8'"),
        ({"dtype": "uint8", "shape": [4, -3], "b64": ""}, "whole numbers"),
        ({"dtype": "uint8", "shape": "4", "b64": ""}, "whole numbers"),
        ({"dtype": "uint8", "shape": [4, 3], "b64": "!"}, "base64"),
        ({"dtype": "uint8", "shape": [4, 3], "b64": 7}, "base64"),
        ({"dtype": "uint8", "shape": [4, 3], "b64": "AAAA"}, "12 bytes for shape .* got 3 bytes"),
        ({"dtype": "uint8", "shape": [2**40, 4, 3], "b64": "AAAA"}, "got 3 bytes"),
        (
            {"dtype": "uint8", "shape": [2**64, 0], "b64": ""},
            r"batch of them; got uint8\[18446744073709551616, 0\]",
        ),
    ],
)
def test_json_values_are_never_wrapped_rounded_or_guessed(value: object, message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        decode_json({"pixels": value})


@pytest.mark.parametrize("body", [b"", b"{", b'{"pixels": NaN}', b"\xff", b"[" * 10_000, b"[1]", b"null", b"1"])
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedBody, match="expected"):
        wire.decode(wire.JSON, body, ONE)


def test_a_mixture_of_items_and_batches_is_refused() -> None:
    with pytest.raises(MalformedBody, match="mixture"):
        decode_json({"pixels": np.zeros((1, 4, 3), int).tolist(), "speed": [0, 0], "on": True}, TWO)


def test_answers_keep_the_form_of_the_question() -> None:
    outputs = {"action": np.array([3, 1]), "action_value": np.array([[0.5, -1.0], [2.0, np.inf]], np.float32)}
    one = {name: array[:1] for name, array in outputs.items()}
    specs = [TensorSpec("action", "int64", ()), TensorSpec("action_value", "float32", (2,))]
    assert json.loads(wire.encode("", one, specs, batched=False)[1]) == {"action": 3, "action_value": [0.5, -1.0]}
    assert json.loads(wire.encode("", outputs, specs, batched=True)[1])["action_value"][1] == [2.0, "Infinity"]
    action = outputs["action"]
    assert wire.encode(wire.RAW, {"action": action}, specs, batched=True) == (wire.RAW, action.tobytes())
    with pytest.raises(NotAcceptable, match="one output"):
        wire.encode(wire.RAW, outputs, specs, batched=True)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", wire.JSON),
        ("*/*", wire.JSON),
        ("application/*", wire.JSON),
        ("application/octet-stream", wire.RAW),
        ("application/octet-stream, application/json", wire.JSON),
        ("application/octet-stream, application/json;q=0.5", wire.RAW),
        ("text/html, application/octet-stream;q=0.9, */*;q=0.8", wire.RAW),
        ("application/json;q=0, */*", wire.RAW),
        ("text/html, */*;q=bogus, application/json", wire.JSON),
    ],
)
def test_accept(accept: str, expected: str) -> None:
    assert wire.negotiate(accept, 1) == expected


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "nonsense"])
def test_what_cannot_be_answered_is_refused(accept: str) -> None:
    with pytest.raises(NotAcceptable, match="expected Accept to allow"):
        wire.negotiate(accept, 1)


@given(body=st.binary(max_size=200), content_type=st.sampled_from([wire.RAW, wire.JSON, "x"]))
def test_any_bytes_are_items_or_a_clear_refusal(body: bytes, content_type: str) -> None:
    try:
        payload = wire.decode(content_type, body, ONE)
    except InvalidRequest as error:
        assert "expected" in error.message
    else:
        ONE.validate(payload.tensors)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "AAAA", "uint8"]),
    lambda inner: st.lists(inner, max_size=4),
)


@given(
    st.dictionaries(
        st.sampled_from(["pixels", "dtype", "b64", "x"]),
        _VALUES | st.dictionaries(st.sampled_from(["dtype", "shape", "b64"]), _VALUES),
    )
)
def test_any_json_object_is_items_or_a_clear_refusal(document: dict[str, object]) -> None:
    try:
        decode_json(document)
    except InvalidRequest as error:
        assert error.message
