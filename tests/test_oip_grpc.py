"""The methods of the protocol's gRPC side, called without a server, with `digest` behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from grpc import StatusCode
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from actserve.core import errors
from actserve.server.admission import Admission
from actserve.server.protocols.grpc.service import InferenceService
from actserve.server.protocols.grpc.status import STATUS, status
from actserve.server.sessions import SessionLimits, Sessions
from tests.fake_policy import NAME, Alone, Versions, seen
from tests.oip import BATCH, same
from tests.oip_grpc import arrays, infer, with_parameters


class AbortedError(Exception):
    """The status with which a call ended."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(code, message)


class Context:
    def invocation_metadata(self) -> None:
        """None: the client sent no metadata."""

    async def abort(self, code: StatusCode, message: str) -> None:
        raise AbortedError(code, message)


class Calls:
    """The methods of a service, called without a server."""

    def __init__(self, registry: Versions, sessions: Sessions) -> None:
        self.registry = registry
        self.runner = asyncio.Runner()
        self.runner.run(self._start(sessions))

    async def _start(self, sessions: Sessions) -> None:
        self.registry.publish()
        self._service = InferenceService(self.registry, sessions, Admission())

    def __call__(self, method: str, request: Any) -> Any:
        return self.runner.run(getattr(self._service, method)(request, Context()))

    def refused(self, method: str, request: Any) -> tuple[StatusCode, str]:
        with pytest.raises(AbortedError) as caught:
            self(method, request)
        code, message = caught.value.args
        return code, message


@pytest.fixture
def call(tmp_path: Path) -> Iterator[Calls]:
    with Sessions(tmp_path / "sessions.sqlite", SessionLimits()) as sessions:
        calls = Calls(Versions(), sessions)
        yield calls
        calls.runner.run(calls.registry.close())
        calls.runner.close()


def test_tensors_may_be_raw_or_spelt_out(call: Calls) -> None:
    whole = arrays(call("ModelInfer", infer(BATCH)))
    assert list(whole) == ["action", "value", "digest", "odd"]
    same(arrays(call("ModelInfer", infer(BATCH, raw=False))), whole)
    response = call("ModelInfer", infer(BATCH, id="seven", outputs=[{"name": "odd"}, {"name": "action"}]))
    assert (response.id, response.model_name, response.model_version) == ("seven", NAME, "1")
    assert list(arrays(response)) == ["odd", "action"]


def test_sequences_of_every_kind_of_id_hold_their_state(call: Calls) -> None:
    request = infer(seen(0))
    request.parameters["sequence_id"].uint64_param = 2**64 - 1
    request.parameters["sequence_start"].bool_param = True
    call("ModelInfer", request)
    for id_ in (1, "1"):
        alone = Alone(1, 5, "random")
        for number in range(5):
            flags = {"sequence_id": id_, "sequence_start": number == 0, "sequence_end": number == 4}
            asked = with_parameters(infer(seen(number)), **flags, **({} if number else {"seed": 5}))
            asked = with_parameters(asked, exploration="random") if number == 0 else asked
            response = call("ModelInfer", asked)
            same(arrays(response), alone.take(seen(number)))
            assert response.parameters["seed"].int64_param != 5, "each step has its own"
        late = with_parameters(infer(seen(0)), sequence_id=id_)
        expected = f"no sequence '1' of {NAME}: never begun, ended or timed out"
        assert call.refused("ModelInfer", late) == (StatusCode.NOT_FOUND, expected)


def wrong(**changes: Any) -> pb.ModelInferRequest:
    tensor = {"name": "x", "datatype": "INT64", "shape": [1], **changes}
    return pb.ModelInferRequest(model_name=NAME, inputs=[tensor])


def raw(*parts: bytes, **changes: Any) -> pb.ModelInferRequest:
    request = wrong(**changes)
    request.raw_input_contents.extend(parts)
    return request


INT64 = {"int64_contents": [3]}


BAD_REQUESTS: dict[str, tuple[pb.ModelInferRequest, str]] = {
    "no input": (pb.ModelInferRequest(model_name=NAME), "x: expected int64[]; got nothing"),
    "no data": (wrong(), "x: expected raw_input_contents or int64_contents; got neither"),
    "data twice": (raw(bytes(8), contents=INT64), "x: expected either contents or raw_input_contents; got both"),
    "another field": (wrong(contents={"fp32_contents": [3]}), "or int64_contents; got fp32_contents"),
    "two fields": (wrong(contents={**INT64, "fp32_contents": [3]}), "got int64_contents, fp32_contents"),
    "too few raw parts": (infer(BATCH, raw_input_contents=[bytes(16)]), "expected 4, one for each input, or none; got"),
    "too many raw parts": (raw(bytes(8), bytes(8)), "raw_input_contents: expected 1, one for each input, or none; got"),
    "too few bytes": (raw(bytes(7)), "x: expected 8 bytes for shape [1]; got 7"),
    "too few elements": (wrong(shape=[2], contents=INT64), "x: expected 2 elements for shape [2]; got 1"),
    "a negative extent": (raw(bytes(8), shape=[-1]), "inputs.0.shape.0: Input should be greater than or equal to 0"),
    "a huge extent": (raw(bytes(8), shape=[2**62]), "x: expected 36,893,488,147,419,103,232 bytes"),
    "an unknown name": (raw(bytes(8), name="y"), "y: expected one of x, digest, odd, is_init"),
    "another datatype": (raw(bytes(8), datatype="BYTES"), "x: expected INT64[-1]; got BYTES[1]"),
    "another shape": (raw(bytes(8), shape=[1, 1]), "x: expected INT64[-1]; got INT64[1, 1]"),
    "out of bounds": (wrong(contents={"int64_contents": [1000]}), "x: expected values of at most 999; got 1000"),
    "bytes that are no booleans": (
        infer({**BATCH, "odd": np.array([1, 2], np.uint8).view(np.bool_)}),
        "odd: expected bytes of 0 or 1",
    ),
    "half of the state": (infer({"x": BATCH["x"], "odd": BATCH["odd"]}), "digest: expected int64[2]; got nothing"),
    "an unknown output": (infer(BATCH, outputs=[{"name": "v"}]), "no output named 'v'; this policy gives action"),
    "a sequence_id of another kind": (with_parameters(infer(seen(1)), sequence_id=True), "parameters.sequence_id"),
    "a negative sequence_id": (with_parameters(infer(seen(1)), sequence_id=-1), "parameters.sequence_id"),
    "a timeout of another kind": (with_parameters(infer(seen(1)), timeout=0.5), "parameters.timeout"),
    "a negative seed": (with_parameters(infer(seen(1)), seed=-1), "expected a seed of 0 to 2**63 - 1; got -1"),
    "unknown exploration": (with_parameters(infer(seen(1)), exploration="some"), "expected an exploration of"),
    "a start of nothing": (with_parameters(infer(seen(1)), sequence_start=True), "expected the sequence_id to start"),
}


@pytest.mark.parametrize(("request_", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_input_is_told_what_was_expected(call: Calls, request_: pb.ModelInferRequest, message: str) -> None:
    code, text = call.refused("ModelInfer", request_)
    assert code is StatusCode.INVALID_ARGUMENT
    assert message in text


WHOLE = with_parameters(infer(BATCH, outputs=[{"name": "action"}]), seed=3, exploration="random").SerializeToString()


REFUSED = {StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND, StatusCode.DEADLINE_EXCEEDED}


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=3))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_to_a_message_makes_the_service_fail(call: Calls, damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(WHOLE)
    for at, value in damage:
        damaged[at] = value
    try:
        request = pb.ModelInferRequest.FromString(bytes(damaged))
    except DecodeError:
        event("no message")
        return
    try:
        assert arrays(call("ModelInfer", request))
    except AbortedError as error:
        event(error.args[0].name)
        assert error.args[0] in REFUSED, error


def test_every_error_has_a_code_and_none_tells_internals(
    call: Calls, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert STATUS[errors.StepConflict] is StatusCode.FAILED_PRECONDITION
    assert status(errors.Overloaded(4)) == (StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded(4).message)
    assert status(errors.NotServing("closing")) == (StatusCode.UNAVAILABLE, "closing")
    assert status(errors.SessionExpired())[0] is StatusCode.NOT_FOUND
    assert not caplog.records
    assert len(status(errors.InvalidRequest("µ" * 9999))[1].encode()) < 4000
    call.registry.runtimes[1].failing = True
    assert call.refused("ModelInfer", infer(BATCH)) == (StatusCode.INTERNAL, "inference failed: ValueError")
    monkeypatch.setattr(call.registry, "describe", lambda name: {}[name])
    message = "the service failed on this request; its log says why"
    asked = pb.ModelMetadataRequest(name=NAME)
    assert call.refused("ModelMetadata", asked) == (StatusCode.INTERNAL, message)
    assert caplog.records[-1].exc_info is not None


def test_the_server_is_not_ready_before_its_policies_are(call: Calls) -> None:
    assert call("ServerLive", pb.ServerLiveRequest()).live
    assert not call("ServerReady", pb.ServerReadyRequest()).ready  # `Versions` never says that it has loaded
    assert call("ModelReady", pb.ModelReadyRequest(name=NAME, version="1")).ready
    assert not call("ModelReady", pb.ModelReadyRequest(name=NAME, version="2")).ready


def test_infer_calls_are_counted_by_status(call: Calls) -> None:
    call("ModelInfer", infer(seen(1)))
    call("ModelInfer", infer(seen(2), id="mine"))
    assert call.refused("ModelInfer", infer({}))[0] == StatusCode.INVALID_ARGUMENT
    assert call.refused("ModelInfer", pb.ModelInferRequest(model_name="nobody"))[0] == StatusCode.NOT_FOUND
    tally = call.registry.counts.tally(NAME, "grpc", "ModelInfer")
    assert dict(tally.codes) == {"OK": 2, "INVALID_ARGUMENT": 1}
    assert dict(tally.reasons) == {"invalid_tensor": 1}
    assert dict(call.registry.counts.tally("", "grpc", "ModelInfer").reasons) == {"unknown_policy": 1}
