from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from actserve.wire.oip import HEADER
from tests.asgi import Caller
from tests.fake_policy import NAME, Versions
from tests.oip import BATCH, INFER, arrays, error, in_binary, in_json, same, serving, tensor


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """The routes, with `digest`@1 behind them."""
    with serving(Versions(), tmp_path_factory.mktemp("oip")) as caller:
        yield caller


def test_json_and_binary_in_and_out_say_the_same(call: Caller) -> None:
    expected = arrays(call("POST", INFER, in_json(BATCH)))
    assert list(expected) == ["action", "value", "digest", "odd"]
    assert expected["value"].shape == (2, 2)
    flat = {"inputs": [tensor(name, array, data=array.ravel().tolist()) for name, array in BATCH.items()]}
    same(arrays(call("POST", INFER, flat)), expected)
    same(arrays(call("POST", INFER, *in_binary(BATCH))), expected)
    same(arrays(call("POST", INFER, *in_binary(BATCH, parameters={"binary_data_output": True}))), expected)
    same(arrays(call("POST", INFER, in_json(BATCH, parameters={"binary_data_output": True}))), expected)
    mixed_inputs, mixed_headers = in_binary({"x": BATCH["x"]})
    mixed = json.loads(mixed_inputs[:-16])
    mixed["inputs"] += in_json({name: array for name, array in BATCH.items() if name != "x"})["inputs"]
    document = json.dumps(mixed).encode()
    assert len(mixed_headers) == 1
    answer = call("POST", INFER, document + BATCH["x"].tobytes(), {HEADER: str(len(document))})
    same(arrays(answer), expected)


def test_outputs_are_chosen_and_each_may_be_binary(call: Caller) -> None:
    outputs = [{"name": "value", "parameters": {"binary_data": True}}, {"name": "action"}]
    answer = call("POST", INFER, in_json(BATCH, outputs=outputs, id="seven"))
    assert list(arrays(answer)) == ["value", "action"]
    document = json.loads(answer.content[: int(answer.headers[HEADER.lower()])])
    assert (document["id"], document["model_name"], document["model_version"]) == ("seven", NAME, "1")
    assert [sorted(output) for output in document["outputs"]] == [
        ["datatype", "name", "parameters", "shape"],
        ["data", "datatype", "name", "shape"],
    ]
    outputs = [{"name": "value", "parameters": {"binary_data": False}}, {"name": "action"}]
    answer = call("POST", INFER, in_json(BATCH, outputs=outputs, parameters={"binary_data_output": True}))
    document = json.loads(answer.content[: int(answer.headers[HEADER.lower()])])
    assert ["data" in output for output in document["outputs"]] == [True, False]


def wrong(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [3], **changes}]}


BAD_REQUESTS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"pixels", "the JSON part: Invalid JSON"),
    "nothing": (b"", "the JSON part: Invalid JSON"),
    "a list": ([], "the JSON part: Input should be an object; got []"),
    "no inputs": ({}, "inputs: Field required"),
    "no input": ({"inputs": []}, "x: expected int64[]; got nothing"),
    "an input without a shape": ({"inputs": [{"name": "x", "datatype": "INT64"}]}, "inputs.0.shape: Field required"),
    "a negative extent": (wrong(shape=[-1]), "greater than or equal to 0; got -1"),
    "an unknown name": (wrong(name="y"), "y: expected one of x, digest, odd, is_init"),
    "an input twice": ({"inputs": wrong()["inputs"] * 2}, "x: expected one input of this name; got several"),
    "another datatype": (wrong(datatype="FP32"), "x: expected INT64[-1]; got FP32[1]"),
    "another shape": (wrong(shape=[1, 1]), "x: expected INT64[-1]; got INT64[1, 1]"),
    "no batch axis": (wrong(shape=[]), "x: expected INT64[-1]; got INT64[]"),
    "too few elements": (wrong(shape=[2]), "x: expected 2 elements for shape [2]; got 1"),
    "no elements": (wrong(shape=[0], data=[]), "x: expected"),
    "no data": (wrong(data=None), "x: expected either data or binary_data_size; got neither"),
    "data twice": (wrong(parameters={"binary_data_size": 8}), "binary_data_size; got both"),
    "data elsewhere": (wrong(data=None, parameters={"binary_data_size": 8}), "8 bytes after the JSON; got the last 0"),
    "fractions": (wrong(data=[0.5]), "x: expected integers; got fractions"),
    "text": (wrong(data=["3"]), "x: expected integers; got text"),
    "ragged": (wrong(data=[[3], [4, 5]]), "unequal length"),
    "out of bounds": (wrong(data=[1000]), "x: expected values of at most 999; got 1000"),
    "two sizes": (in_json({**BATCH, "x": BATCH["x"][:1]}), "the same number of items"),
    "half of the state": (in_json({"x": BATCH["x"], "odd": BATCH["odd"]}), "digest: expected int64[2]; got nothing"),
    "an unknown output": ({**wrong(), "outputs": [{"name": "v"}]}, "'v'; this policy gives action, value, digest, odd"),
    "classification": (
        {**wrong(), "outputs": [{"name": "value", "parameters": {"classification": 2}}]},
        "value: classification is not offered",
    ),
    "shared memory out": (
        {**wrong(), "outputs": [{"name": "value", "parameters": {"shared_memory_region": "r"}}]},
        "value: expected at least 8 bytes of shared memory; got a shared_memory_byte_size of None",
    ),
    "shared memory in": (
        wrong(data=None, parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8}),
        "no shared memory region 'r' is registered",
    ),
    "shared memory in, of no size": (
        wrong(data=None, parameters={"shared_memory_region": "r"}),
        "x: expected 8 bytes for shape [1]; got a shared_memory_byte_size of None",
    ),
    "a sequence_id of another kind": ({**wrong(), "parameters": {"sequence_id": True}}, "parameters.sequence_id"),
    "too large a sequence_id": ({**wrong(), "parameters": {"sequence_id": 2**64}}, "less than 18446744073709551616"),
    "a timeout of another kind": ({**wrong(), "parameters": {"timeout": "1 s"}}, "parameters.timeout"),
    "a seed of another kind": ({**wrong(), "parameters": {"seed": -1}}, "expected a seed of 0 to 2**63 - 1; got -1"),
    "unknown exploration": ({**wrong(), "parameters": {"exploration": "some"}}, "expected an exploration of"),
}


@pytest.mark.parametrize(("body", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_input_is_told_what_was_expected(call: Caller, body: Any, message: str) -> None:
    status, text = error(call("POST", INFER, body))
    assert status == 400
    assert message in text


def test_binary_data_must_be_as_long_as_it_says(call: Caller) -> None:
    body, headers = in_binary({"x": np.array([3], np.int64)})
    length = int(headers[HEADER])
    for sent, says, message in (
        (body + b"x", length, "expected 8 bytes after the JSON; got 9"),
        (body[:-1], length, "x: expected 8 bytes after the JSON; got the last 7"),
        (body.replace(b"8", b"4"), length, "x: expected 8 bytes for shape [1]; got a binary_data_size of 4"),
        (body, length - 1, "the JSON part: Invalid JSON"),
        (body, len(body) + 1, f"expected {HEADER} of 0 to {len(body)}, the body's length; got"),
        (body, "-1", f"expected {HEADER} of 0 to"),
        (body, "1" * 5000, f"expected {HEADER} of 0 to"),
    ):
        status, text = error(call("POST", INFER, sent, {HEADER: str(says)}))
        assert status == 400
        assert message in text
    odd, headers = in_binary({**BATCH, "odd": np.array([1, 2], np.uint8).view(np.bool_)})
    assert "odd: expected bytes of 0 or 1" in error(call("POST", INFER, odd, headers))[1]


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    return st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner), max_leaves=10
    )


ASKED: dict[str, Any] = {
    "id": "a",
    "outputs": [{"name": "value", "parameters": {"binary_data": True}}, {"name": "action", "parameters": {}}],
    "parameters": {"sequence_id": 0, "timeout": 0, "seed": 3, "exploration": "random", "binary_data_output": False},
}
PLAUSIBLE: list[Any] = [
    *(None, True, -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, 0.5, float("inf")),
    *("", "x", "odd", "INT64", "BOOL", "BYTES", "random"),
    *([], [1], [2, 2], [2**32, 2**32], [0, 2**63], [[1], [2]], [1, [2]]),
    *({}, {"binary_data_size": 16}, {"shared_memory_region": "r"}, {"classification": 1}),
    *({"sequence_id": 1}, {"sequence_id": 1, "sequence_start": True}),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with every key or index in it."""
    found: list[tuple[Any, Any]] = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places(value[key])]
    return found


def answered(call: Caller, body: bytes, headers: dict[str, str]) -> None:
    """An answer or an error in the protocol's shape, but no failure."""
    answer = call("POST", INFER, body, headers)
    event(str(answer.status))
    if answer.status == 200:
        assert arrays(answer)
    else:
        status, message = error(answer)
        assert (status in (400, 404, 503), len(message) > 10) == (True, True), (status, message)


@given(st.data())
@settings(max_examples=250)
def test_no_change_to_a_request_makes_the_service_fail(call: Caller, data: st.DataObject) -> None:
    if binary := data.draw(st.booleans()):
        body, headers = in_binary(BATCH, **ASKED)
        document, rest = json.loads(body[: int(headers[HEADER])]), body[int(headers[HEADER]) :]
    else:
        document, rest = json.loads(json.dumps(in_json(BATCH, **ASKED))), b""
    for _ in range(data.draw(st.integers(0, 2))):
        container, key = data.draw(st.sampled_from(places(document)))
        container[key] = copy.deepcopy(data.draw(st.sampled_from(PLAUSIBLE) | json_values()))
        if data.draw(st.integers(0, 9)) == 0:
            del container[key]
    content = json.dumps(document).encode()
    answered(call, content + rest, {HEADER: str(len(content))} if binary else {})


@given(json_values())
@settings(max_examples=50)
def test_nor_does_json_of_any_other_shape(call: Caller, value: Any) -> None:
    answered(call, json.dumps(value).encode(), {})


@given(st.data())
@settings(max_examples=250)
def test_nor_do_damaged_bytes(call: Caller, data: st.DataObject) -> None:
    whole, headers = in_binary(BATCH, parameters={"binary_data_output": True})
    body = bytearray(whole)
    place = st.integers(int(headers[HEADER]), len(body) - 1) | st.integers(0, len(body) - 1)
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=3)):
        body[at] = value
    length = headers[HEADER]
    if data.draw(st.booleans()):
        del body[data.draw(st.integers(0, len(body))) :]
        length = data.draw(st.just(length) | st.integers(-1, 400).map(str) | st.text("0123456789-x"))
    answered(call, bytes(body), {HEADER: length})


@given(st.data())
@settings(max_examples=100)
def test_what_json_says_is_what_the_policy_gets(call: Caller, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 20))
    numbers = data.draw(st.lists(st.integers(0, 999), min_size=size, max_size=size))
    batch = {"x": np.array(numbers, np.int64)}
    expected = arrays(call("POST", INFER, in_json(batch)))
    same(arrays(call("POST", INFER, *in_binary(batch, parameters={"binary_data_output": True}))), expected)
    padded = in_binary(batch, id=data.draw(st.text("x", max_size=9)))  # the data at any alignment
    same(arrays(call("POST", INFER, *padded)), expected)
