"""Each end reads exactly what the other writes, in every encoding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actserve import wire
from actserve.core.errors import InvalidRequest, InvalidTensor, MalformedBody, UnsupportedContentType
from actserve.core.signature import Array, TensorSpec
from tests.tensors import ACTION, assert_same, requests, signatures, specs, values

VALUE = TensorSpec("action_value", "float32", (3,))
EVERY = [wire.JSON, wire.RAW, wire.SAFETENSORS]


@pytest.mark.parametrize("content_type", [wire.JSON, wire.SAFETENSORS])
@given(data=st.data())
def test_a_request(content_type: str, data: st.DataObject) -> None:
    signature = data.draw(signatures())
    payload = data.draw(requests(signature))
    assert_same(
        wire.decode(content_type, wire.encode_request(content_type, payload, signature.request_inputs), signature),
        payload,
    )


@given(specs(["x"]), st.integers(1, 3), st.integers(0, 100))
def test_a_raw_request(observation: list[TensorSpec], size: int, seed: int) -> None:
    payload = wire.Payload(values(observation, size, seed), batched=size > 1)
    content = wire.encode_request(wire.RAW, payload, observation)
    assert_same(wire.decode_answer(wire.RAW, content, observation), payload)


@pytest.mark.parametrize("content_type", [wire.JSON, wire.SAFETENSORS])
@given(outputs=specs(["action", "q", "h"]), size=st.integers(1, 3), batched=st.booleans(), seed=st.none() | st.just(5))
def test_an_answer(content_type: str, outputs: list[TensorSpec], size: int, batched: bool, seed: int | None) -> None:
    answer = wire.Payload(values(outputs, size, 0), batched or size > 1, seed=seed)
    content = wire.encode(content_type, answer.tensors, outputs, answer.batched, answer.seed)
    assert content[0] == content_type
    assert_same(wire.decode_answer(*content, outputs), answer)


@pytest.mark.parametrize("content_type", EVERY)
@given(st.lists(st.floats(width=32), min_size=3, max_size=3))
def test_every_float(content_type: str, numbers: list[float]) -> None:
    array = np.array([numbers], np.float32)
    answer = wire.decode_answer(*wire.encode(content_type, {"action_value": array}, [VALUE], batched=False), [VALUE])
    np.testing.assert_array_equal(answer.tensors["action_value"], array, strict=True)


@pytest.mark.parametrize("content_type", EVERY)
@pytest.mark.parametrize(
    "array", [np.array([[7, 1], [8, 2]])[:, 0], np.array([7, 8], ">i8")], ids=["strided", "big-endian"]
)
def test_the_layout_in_memory_does_not_matter(content_type: str, array: Array) -> None:
    answer = wire.decode_answer(*wire.encode(content_type, {"action": array}, [ACTION], batched=True), [ACTION])
    assert answer.tensors["action"].tolist() == [7, 8]


def test_a_request_that_raw_bytes_cannot_say_is_refused() -> None:
    action = {"action": np.array([1])}
    for payload in (wire.Payload(action, False, seed=1), wire.Payload(action | {"x": np.array([1])}, False)):
        with pytest.raises(UnsupportedContentType, match="expected a Content-Type of application/json"):
            wire.encode_request(wire.RAW, payload, [ACTION])


@pytest.mark.parametrize(
    ("content_type", "content", "error", "message"),
    [
        ("text/html", b"<html>", UnsupportedContentType, "application/json"),
        (wire.PNG, b"", UnsupportedContentType, "application/json"),
        (wire.JSON, b"{}", InvalidTensor, "action: expected int64\\[\\]; got nothing"),
        (wire.JSON, b'{"action": []}', InvalidTensor, "at least one; got int64\\[0\\]"),
        (wire.JSON, b'{"action": 1, "action_value": [[1, 2, 3]]}', MalformedBody, "mixture"),
        (wire.JSON, b'{"action": [1, 2], "action_value": [[1, 2, 3]]}', InvalidTensor, "same number of items"),
        (wire.JSON, b'{"action": 1, "action_value": [1, 2, "3"]}', InvalidTensor, "expected numbers; got text"),
        (wire.JSON, b'{"action": 1, "action_value": [1, 2, 1e39]}', InvalidTensor, "got 1.0 to 1e\\+39"),
        (wire.RAW, bytes(8), UnsupportedContentType, "carries one tensor, for action, action_value"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_is_refused(
    content_type: str, content: bytes, error: type[InvalidRequest], message: str
) -> None:
    with pytest.raises(error, match=message):
        wire.decode_answer(content_type, content, [ACTION, VALUE])
