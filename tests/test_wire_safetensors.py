"""Safetensors bodies: the library reads what we write, and refuses what we refuse as broken."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from actserve import wire
from actserve.core.errors import InvalidRequest, InvalidTensor, MalformedBody
from actserve.core.signature import Arrays, Signature, State, TensorSpec
from actserve.wire.as_safetensors import MAX_HEADER_BYTES
from tests.tensors import ACTION, assert_same, requests, signatures

PIXELS = TensorSpec("pixels", "uint8", (4, 3))
HIDDEN = TensorSpec("h", "float32", (2,))
RECURRENT = Signature((PIXELS,), (ACTION,), 256, (State(HIDDEN, "h_next"),), is_init=True)
TENSORS: Arrays = {
    "pixels": np.arange(12, dtype=np.uint8).reshape(4, 3),
    "h": np.array([0.5, -1], np.float32),
    "is_init": np.array(False),
}


def body(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "U8", shape: object = (4, 3), begin: object = 0, end: object = 12) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def decode(content: bytes | bytearray | memoryview) -> wire.Payload:
    return wire.decode(wire.SAFETENSORS, content, RECURRENT)


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_one_item_of_named_tensors(form: type) -> None:
    payload = decode(form(safetensors.numpy.save(TENSORS, {"seed": "7", "exploration": "random", "session": "a-b"})))
    assert_same(payload, wire.Payload({n: a[None] for n, a in TENSORS.items()}, False, "random", 7, "a-b"))


def test_a_batch_of_one_is_a_batch() -> None:
    payload = decode(safetensors.numpy.save({name: array[None] for name, array in TENSORS.items()}))
    assert payload.batched
    assert payload.size == 1


def test_tensors_are_views_of_the_body_but_for_those_at_odd_addresses() -> None:
    content = bytearray(safetensors.numpy.save(TENSORS))
    assert all(array.base is not None for array in decode(content).tensors.values())
    header_bytes = int.from_bytes(content[:8], "little")
    shifted = bytearray(body(bytes(content[8 : 8 + header_bytes]) + b" ", bytes(content[8 + header_bytes :])))
    payload = decode(shifted)
    assert_same(payload, decode(content))
    assert all(array.flags.aligned for array in payload.tensors.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begin with 8 bytes; got 0"),
        (b"\0" * 7, "begin with 8 bytes; got 7"),
        (b"\0" * 8, "header in JSON"),
        (b"\xff" * 8, "header of at most 0 bytes; got 18,446,744,073,709,551,615"),
        (b"\xff" * 800_000, "header of at most 65,536 bytes"),
        (body(b"{" + b" " * MAX_HEADER_BYTES + b"}"), "header of at most 65,536 bytes; got 65,538"),
        (body(b"{" + b'"a":[' * 10_000), "header in JSON"),
        (body(b"\xff\xff"), "header in JSON"),
        (body([1]), "header that is a JSON object"),
        (body({"__metadata__": 1}), "metadata of text"),
        (body({"__metadata__": {"seed": 1}}), "metadata of text"),
        (body({"__metadata__": {"seed": "-1"}}), "seed of 0 to"),
        (body({"__metadata__": {"session": ""}}), "session id of 1 to 200"),
        (body({"__metadata__": {"session": "x" * 201}}), "session id of 1 to 200"),
        (body({"__metadata__": {"session": "a b"}}), "session id of 1 to 200"),
        (body({"__metadata__": {"exploration": "wild"}}), "deterministic or random; got 'wild'"),
        (body({"__metadata__": {"sede": "1"}}), "metadata of exploration, seed, session; got 'sede'"),
        (body({"pixels": 1}), 'pixels: expected {"dtype", "shape", "data_offsets"}; got 1'),
        (body({"pixels": entry() | {"more": 1}}, bytes(12)), "got {"),
        (body({"pixels": entry(begin=-1)}, bytes(12)), "got {"),
        (body({"pixels": entry(begin=0.0)}, bytes(12)), "got {"),
        (body({"pixels": entry(begin=12, end=0)}, bytes(12)), "got {"),
        (body({"pixels": entry(shape=[4, -3])}, bytes(12)), "got {"),
        (body({"pixels": entry(shape=[4, 3.0])}, bytes(12)), "got {"),
        (body({"pixels": entry(shape=12)}, bytes(12)), "got {"),
        (body({"pixels": entry(begin=1, end=13)}, bytes(13)), "'pixels' to begin at byte 0 of the tensors; got 1"),
        (body({"pixels": entry(), "h": entry("F32", [2], 8, 16)}, bytes(16)), "'h' to begin at byte 12"),
        (body({"pixels": entry()}, bytes(13)), "expected 12 bytes of tensors; got 13"),
    ],
)
def test_what_is_not_safetensors_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(MalformedBody) as caught:
        decode(content)
    assert message in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"pixels": np.zeros((4, 3), np.int8)}, "pixels: expected dtype U8 (uint8[4, 3]); got I8"),
        ({"pixels": np.zeros((4, 3), np.float16)}, "got F16"),
        ({"pixels": np.zeros((3, 4), np.uint8)}, "expected uint8[4, 3], or a batch of them; got uint8[3, 4]"),
        ({"pixels": np.zeros((0, 4, 3), np.uint8)}, "at least one item"),
        ({"pixels": np.zeros((1, 1, 4, 3), np.uint8)}, "got uint8[1, 1, 4, 3]"),
        ({"screen": np.zeros((4, 3), np.uint8)}, "screen: expected one of pixels, h, is_init"),
        ({"h": np.zeros(2, np.float32)}, "pixels: expected uint8[4, 3]; got nothing"),
        (TENSORS | {"h": np.array([0, np.nan], np.float32)}, "h: expected numbers; got NaN"),
        ({n: np.stack([a] * (2 + (n == "h"))) for n, a in TENSORS.items()}, "same number of items"),
    ],
)
def test_tensors_that_the_policy_does_not_take_are_refused(tensors: Arrays, message: str) -> None:
    with pytest.raises(InvalidTensor) as caught:
        decode(safetensors.numpy.save(tensors))
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("changed", "data", "message"),
    [
        (entry(end=11), bytes(11), "12 bytes for shape [4, 3]; got 11 bytes"),
        (entry(), bytes(11), "12 bytes for shape [4, 3]; got 11 bytes"),
        (entry(shape=[2**64, 4, 3]), bytes(12), "bytes for shape"),
        (entry(shape=[2**64, 0], end=0), b"", "or a batch of them; got uint8[18446744073709551616, 0]"),
        (entry(shape=[1] * 1000), bytes(12), "1, …]"),
        (entry("F8_E4M3"), bytes(12), "got F8_E4M3"),
        (entry("?" * 1000), bytes(12), "got ???"),
    ],
)
def test_a_header_that_lies_is_refused(changed: dict[str, object], data: bytes, message: str) -> None:
    with pytest.raises(InvalidTensor) as caught:
        decode(body({"pixels": changed}, data))
    assert message in caught.value.message
    assert len(caught.value.message) < 500


def test_a_boolean_is_0_or_1() -> None:
    with pytest.raises(InvalidTensor, match="is_init: expected bytes of 0 or 1 for bool; got 5"):
        decode(body({"pixels": entry(), "is_init": entry("BOOL", [], 12, 13)}, bytes(12) + b"\x05"))


def test_a_mixture_of_items_and_batches_is_refused() -> None:
    with pytest.raises(MalformedBody, match="mixture"):
        decode(safetensors.numpy.save(TENSORS | {"pixels": np.zeros((1, 4, 3), np.uint8)}))


@given(st.data())
def test_the_library_reads_what_we_write(data: st.DataObject) -> None:
    signature = data.draw(signatures())
    payload = data.draw(requests(signature))
    content = wire.encode_request(wire.SAFETENSORS, payload, signature.request_inputs)
    dtypes = {spec.name: spec.dtype for spec in signature.request_inputs}
    import safetensors.torch  # a second: only where this test runs

    for name, tensor in safetensors.torch.load(content).items():
        assert str(tensor.dtype) == f"torch.{dtypes[name]}"
        array = (tensor.float() if dtypes[name] == "bfloat16" else tensor).numpy()
        np.testing.assert_array_equal(array, payload.wire_tensors()[name], strict=True)


_VALID = wire.encode_request(
    wire.SAFETENSORS, decode(safetensors.numpy.save(TENSORS, {"seed": "7"})), RECURRENT.request_inputs
)
_EDITS = st.lists(
    st.tuples(
        st.integers(0, len(_VALID)), st.integers(0, 12), st.binary(max_size=12) | st.sampled_from([b"[", b"}", b"9"])
    ),
    max_size=4,
)


def _edited(edits: list[tuple[int, int, bytes]], mend: bool) -> bytes:
    """A valid body with some of its bytes replaced; mended, so that the header's length is that of the header again."""
    content = _VALID
    for at, removed, added in edits:
        content = content[:at] + added + content[at + removed :]
    end = content.rfind(b"}") + 1
    return max(0, end - 8).to_bytes(8, "little") + content[8:] if mend else content


@given(st.binary(max_size=200) | st.binary(max_size=200).map(body) | st.builds(_edited, _EDITS, st.booleans()))
def test_any_bytes_are_items_that_the_library_reads_too_or_a_clear_refusal(content: bytes) -> None:
    try:
        payload = decode(content)
    except InvalidRequest as error:
        assert "expected" in error.message
        assert len(error.message) < 1000
    else:
        theirs = safetensors.numpy.load(content)
        assert theirs.keys() == payload.tensors.keys()
        for name, array in payload.wire_tensors().items():
            np.testing.assert_array_equal(array, theirs[name], strict=True)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_SIZES = st.lists(st.integers(0, 5) | st.integers(), max_size=4)
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BOOL", "BF16"]) | _JSON,
        "shape": _SIZES | _JSON,
        "data_offsets": _SIZES | _JSON,
    }
)


@given(
    st.dictionaries(st.sampled_from(["pixels", "h", "is_init", "__metadata__", "x"]), _ENTRIES | _JSON),
    st.binary(max_size=40),
)
def test_any_header_is_items_or_a_clear_refusal(header: dict[str, object], data: bytes) -> None:
    try:
        decode(body(header, data))
    except InvalidRequest as error:
        assert "expected" in error.message
        assert len(error.message) < 1000
