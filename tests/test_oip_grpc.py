"""The gRPC side of the protocol with `digest` behind it: its methods without a socket, its server with one."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from grpc import StatusCode
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from app import errors
from app.client.local import free_port
from app.errors import UsageError
from app.grpc import check
from app.grpc.errors import STATUS, status
from app.grpc.messages import CONTENTS
from app.grpc.server import serving
from app.grpc.service import Service
from app.grpc.stream import WINDOW, Conversation
from app.sessions import Limits, Sessions
from app.settings import Settings
from app.signature import Array, Arrays
from app.wire.oip import DATATYPES
from tests.fake_policy import NAME, SLOW, Alone, Versions, seen
from tests.oip import BATCH, MAX_BODY_BYTES, same
from tests.waiting import until_in_loop


class AbortedError(Exception):
    """What a call ended with."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(code, message)


class Context:
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
        self._service = Service(self.registry, sessions)

    def __call__(self, method: str, request: Any) -> Any:
        return self.runner.run(getattr(self._service, method)(request, Context()))

    def refused(self, method: str, request: Any) -> tuple[StatusCode, str]:
        with pytest.raises(AbortedError) as caught:
            self(method, request)
        code, message = caught.value.args
        return code, message


@pytest.fixture
def call(tmp_path: Path) -> Iterator[Calls]:
    with Sessions(tmp_path / "sessions.sqlite", Limits()) as sessions:
        calls = Calls(Versions(), sessions)
        yield calls
        calls.runner.run(calls.registry.close())
        calls.runner.close()


def described(name: str, array: Array, **fields: Any) -> dict[str, Any]:
    return {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": array.shape, **fields}


def infer(tensors: Arrays, raw: bool = True, **fields: Any) -> pb.ModelInferRequest:
    """A request with its data in `raw_input_contents`, or in each tensor's `contents`."""
    if raw:
        data = {"raw_input_contents": [array.tobytes() for array in tensors.values()]}
        inputs = [described(name, array) for name, array in tensors.items()]
    else:
        data = {}
        inputs = [
            described(name, array, contents={CONTENTS[array.dtype.name]: array.ravel().tolist()})
            for name, array in tensors.items()
        ]
    return pb.ModelInferRequest(**{"model_name": NAME, "inputs": inputs, **data, **fields})


def with_parameters(request: pb.ModelInferRequest, **parameters: Any) -> pb.ModelInferRequest:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def arrays(response: pb.ModelInferResponse) -> Arrays:
    dtypes = {datatype: dtype for dtype, datatype in DATATYPES.items()}
    return {
        output.name: np.frombuffer(raw, dtypes[output.datatype]).reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


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


Act = Callable[[int], Awaitable[int]]


async def converse(numbers: list[int], act: Act, sequence: Callable[[int], Any]) -> list[int]:
    sent: list[int] = []

    async def received() -> AsyncIterator[int]:
        for number in numbers:
            yield number

    async def send(reply: int) -> None:
        sent.append(reply)

    assert await Conversation(act, sequence, send).run(received(), asyncio.Event())
    return sent


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 4), st.randoms(use_true_random=False))
def test_replies_come_in_order_and_sequences_act_in_order(numbers: list[int], sequences: int, random: Any) -> None:
    acted: list[int] = []
    in_flight = 0

    async def act(number: int) -> int:
        nonlocal in_flight
        in_flight += 1
        assert in_flight <= WINDOW
        for _ in range(random.randrange(5)):
            await asyncio.sleep(0)
        acted.append(number)
        in_flight -= 1
        return number

    def sequence(number: int) -> int | None:
        return number % sequences or None

    numbers = [index * 10 + number for index, number in enumerate(numbers)]
    assert asyncio.run(converse(numbers, act, sequence)) == numbers
    for id_ in range(1, sequences):
        assert [n for n in acted if sequence(n) == id_] == [n for n in numbers if sequence(n) == id_]


def test_requests_of_no_sequence_act_at_once() -> None:
    async def main() -> None:
        together = asyncio.Barrier(4)

        async def act(number: int) -> int:
            async with asyncio.timeout(10):
                await together.wait()
            return number

        assert await converse([1, 2, 3, 4], act, lambda _: None) == [1, 2, 3, 4]

    asyncio.run(main())


@asynccontextmanager
async def served(registry: Versions, folder: Path) -> AsyncIterator[tuple[grpc.aio.Channel, AsyncExitStack]]:
    """A channel to the service, and what ends the service when it is closed."""
    chosen = Settings(grpc_port=free_port(), max_body_bytes=MAX_BODY_BYTES)
    with Sessions(folder / "sessions.sqlite", Limits()) as sessions:
        registry.publish()
        async with AsyncExitStack() as service:
            await service.enter_async_context(serving(registry, sessions, chosen))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{chosen.grpc_port}") as channel:
                yield channel, service
        await registry.close()


def hold(registry: Versions) -> threading.Event:
    """Until the event is set the runtime answers nothing."""
    runtime, open_ = registry.runtimes[1], threading.Event()
    run = runtime._run
    runtime._run = lambda arrays: run(arrays) if open_.wait(30) else []  # type: ignore[method-assign]
    return open_


def test_what_was_accepted_is_answered_before_the_server_ends(tmp_path: Path) -> None:
    async def main() -> None:
        registry = Versions(SLOW)
        async with served(registry, tmp_path) as (channel, service):
            stub = GRPCInferenceServiceStub(channel)
            alone = arrays(await stub.ModelInfer(infer(BATCH)))
            open_ = hold(registry)
            unary = asyncio.ensure_future(stub.ModelInfer(infer(BATCH)))
            stream = stub.ModelStreamInfer()
            for number in range(3):
                await stream.write(infer(BATCH, id=str(number)))
            await until_in_loop(lambda: registry.policies[1].statistics().waiting == 8)
            ending = asyncio.create_task(service.aclose())
            await asyncio.sleep(0.05)
            assert not ending.done()
            open_.set()
            same(arrays(await unary), alone)
            for number in range(3):
                response = await stream.read()
                assert (response.infer_response.id, response.error_message) == (str(number), "")
                same(arrays(response.infer_response), alone)
            with pytest.raises(grpc.aio.AioRpcError, match="the service is closing") as caught:
                await stream.read()
            assert caught.value.code() is StatusCode.UNAVAILABLE
            await ending
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ServerLive(pb.ServerLiveRequest())
            assert caught.value.code() is StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_calls_that_end_early_move_nothing(tmp_path: Path) -> None:
    def step(x: int, start: bool = False) -> pb.ModelInferRequest:
        return with_parameters(infer(seen(x)), sequence_id=7, sequence_start=start)

    async def main() -> None:
        registry, alone = Versions(SLOW), Alone(1, 0, None)
        async with served(registry, tmp_path) as (channel, _):
            stub = GRPCInferenceServiceStub(channel)
            same(arrays(await stub.ModelInfer(step(3, start=True))), alone.take(seen(3)))
            open_ = hold(registry)

            def waiting(calls: int) -> Callable[[], bool]:
                return lambda: registry.policies[1].statistics().waiting == calls

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(step(4), timeout=0.2)
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
            call, stream = stub.ModelInfer(step(4)), stub.ModelStreamInfer()
            await until_in_loop(waiting(2))
            await stream.write(step(4))
            await until_in_loop(waiting(3))
            call.cancel()
            stream.cancel()
            late = with_parameters(step(4), timeout=1000)
            with pytest.raises(grpc.aio.AioRpcError, match="within the timeout of 1,000 µs") as caught:
                await stub.ModelInfer(late)
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
            await asyncio.sleep(0.1)
            open_.set()
            same(arrays(await stub.ModelInfer(step(5))), alone.take(seen(5)))

    asyncio.run(main())


def test_messages_are_bounded_and_what_is_none_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with served(Versions(SLOW), tmp_path) as (channel, _):
            stub = GRPCInferenceServiceStub(channel)
            fits = infer({"x": np.zeros(MAX_BODY_BYTES // 8, np.int64)})
            assert len(arrays(await stub.ModelInfer(fits))["action"]) == MAX_BODY_BYTES // 8
            for size, compression in ((1 << 18, None), (64 << 20, grpc.Compression.Gzip)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.ModelInfer(infer({"x": np.zeros(size // 8, np.int64)}), compression=compression)
                assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
            for method in ("ModelInfer", "ModelMetadata"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"pixels")
                message = f"expected a {method}Request; got something else"
                assert (caught.value.code(), caught.value.details()) == (StatusCode.INVALID_ARGUMENT, message)
            stream = channel.stream_stream(
                "/inference.GRPCInferenceService/ModelStreamInfer",
                response_deserializer=pb.ModelStreamInferResponse.FromString,
            )()
            await stream.write(b"pixels")
            await stream.write(infer(BATCH).SerializeToString())
            await stream.done_writing()
            assert (await stream.read()).error_message == "expected a ModelInferRequest; got something else"
            assert arrays((await stream.read()).infer_response)
            assert await stream.read() is grpc.aio.EOF
            assert not caplog.records

    asyncio.run(main())


def test_what_is_not_offered_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(Versions(SLOW), tmp_path) as (channel, _):
            for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
                call = getattr(GRPCInferenceServiceStub(channel), method.name)
                offered = not method.name.startswith(("System", "Cuda", "Trace", "Log", "RepositoryModel"))
                if offered:
                    assert hasattr(Service, method.name)
                    continue
                with pytest.raises(grpc.aio.AioRpcError, match="the extensions offered are binary") as caught:
                    await call(getattr(pb, method.input_type.name)())
                assert caught.value.code() is StatusCode.UNIMPLEMENTED

    asyncio.run(main())


def test_libraries_that_are_absent_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("app.grpc.server", "app.grpc.service"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(UsageError, match=r'gRPC needs grpc; install it with: pip install "actserve\[grpc\]"'):
        check(Settings(grpc_port=1))


def test_a_port_that_is_taken_is_told_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen = Settings(grpc_port=taken.getsockname()[1])
        with pytest.raises(UsageError, match="for gRPC: Address already in use"):
            check(chosen)
    check(chosen)
    check(Settings())


def test_infer_calls_are_counted_by_status(call: Calls) -> None:
    call("ModelInfer", infer(seen(1)))
    call("ModelInfer", infer(seen(2), id="mine"))
    assert call.refused("ModelInfer", infer({}))[0] == StatusCode.INVALID_ARGUMENT
    assert call.refused("ModelInfer", pb.ModelInferRequest(model_name="nobody"))[0] == StatusCode.NOT_FOUND
    tally = call.registry.counts.tally(NAME, "grpc", "ModelInfer")
    assert dict(tally.codes) == {"OK": 2, "INVALID_ARGUMENT": 1}
    assert dict(tally.reasons) == {"invalid_tensor": 1}
    assert dict(call.registry.counts.tally("", "grpc", "ModelInfer").reasons) == {"unknown_policy": 1}
