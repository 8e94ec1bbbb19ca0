from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actserve.core.errors import InvalidRequest, MalformedBody
from actserve.core.signature import TensorSpec
from actserve.wire.stream_messages import Hello, Reply, ReplyCodec, Result, read_result, result_message
from tests import tensors

UINT32 = st.integers(0, 2**32 - 1)


@given(st.data(), tensors.specs(tensors.NAMES), st.integers(1, 2**63), UINT32, UINT32)
def test_a_reply_survives_either_form(
    data: st.DataObject, specs: list[TensorSpec], step: int, queue_us: int, run_us: int
) -> None:
    outputs = {name: array[0] for name, array in tensors.values(specs, 1, data.draw(UINT32)).items()}
    replies = ReplyCodec(specs)
    reply = Reply(step, outputs, queue_us, run_us)
    for got in (replies.unpack(replies.pack(reply)), replies.from_json(replies.to_json(reply))):
        assert (got.step, got.queue_us, got.run_us) == (step, queue_us, run_us)
        assert got.outputs.keys() == outputs.keys()
        for name, array in outputs.items():
            np.testing.assert_array_equal(got.outputs[name], array, strict=True)


def test_a_binary_reply_is_read_without_us() -> None:
    specs = [TensorSpec("action", "int64", ()), TensorSpec("flags", "bool", (3,)), TensorSpec("value", "float32", (2,))]
    replies = ReplyCodec(specs)
    outputs = {
        "action": np.array(-2, np.int64),
        "flags": np.array([True, False, True]),
        "value": np.array([1.5, np.inf], np.float32),
    }
    assert replies.offsets == {"action": 16, "flags": 24, "value": 32}
    message = replies.pack(Reply(7, outputs, 2**40, 310))
    assert message == bytes.fromhex(
        "0700000000000000"  # step
        "ffffffff"  # queue_us, more than fits
        "36010000"  # run_us
        "feffffffffffffff"  # action
        "010001" + 5 * "00" +  # flags
        "0000c03f0000807f"  # value
    )  # fmt: skip


@given(st.none() | st.floats(allow_nan=False, allow_infinity=False), st.none() | st.booleans())
def test_a_result_survives(reward: float | None, done: bool | None) -> None:
    result = Result(reward=reward, done=done)
    assert read_result(result_message(result)) == result


@pytest.mark.parametrize(
    "text",
    [
        "",
        '"result"',
        '{"result": [1, 2]}',
        '{"result": {}, "x": 1}',
        '{"result": {"dtype": "float32", "shape": [], "b64": "AAAAAA=="}}',
        '{"result": {}' + 256 * " " + "}",
    ],
)
def test_what_is_no_result_is_another_message(text: str) -> None:
    assert read_result(text) is None


@pytest.mark.parametrize("result", ['{"reward": NaN}', '{"reward": "x"}', '{"done": 1}', '{"reword": 1}'])
def test_a_wrong_result_is_refused(result: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a result with reward, a number, and done"):
        read_result('{"result": ' + result + "}")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"action": [1, 2], "step": 1, "queue_us": 1, "run_us": 1}'])
def test_another_reply_is_refused(text: str) -> None:
    replies = ReplyCodec([TensorSpec("action", "int64", ())])
    with pytest.raises(MalformedBody, match="expected a reply with action"):
        replies.from_json(text)
    with pytest.raises(MalformedBody, match="expected a reply of 24 bytes"):
        replies.unpack(text.encode())
    with pytest.raises(MalformedBody, match="expected a hello"):
        Hello.from_json(text)
