"""tritonclient.grpc, as it comes from the registry, against the service as it is started."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from tritonclient.utils import InferenceServerException

from actserve.cli.tools import local_service as local
from actserve.core.signature import Arrays
from actserve.store.local import ModelStore
from tests.e2e.test_tritonclient import DATATYPES, STEPS, observations, same
from tests.e2e.test_tritonclient import carried as carried_over_http
from tests.waiting import until


@pytest.fixture(scope="module", params=["onnx", "pt2"])
def addresses(request: pytest.FixtureRequest, gru_store: ModelStore) -> Iterator[tuple[str, str]]:
    """Host and port of gRPC and of HTTP."""
    port = local.free_port()
    with local.serve(gru_store.root, "--runtime", request.param, "--grpc-port", str(port)) as running:
        yield f"127.0.0.1:{port}", running.url.removeprefix("http://")


@pytest.fixture(scope="module")
def address(addresses: tuple[str, str]) -> str:
    return addresses[0]


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as connected:
        yield connected


@pytest.fixture(scope="module")
def stub(address: str) -> Iterator[Any]:
    """The protocol itself, for what tritonclient does not say."""
    with grpc.insecure_channel(address) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def expected(addresses: tuple[str, str]) -> list[list[Arrays]]:
    """Two episodes over HTTP, whose state the client carried."""
    with triton_http.InferenceServerClient(addresses[1]) as http:
        (state,) = {i["name"] for i in http.get_model_metadata("gru")["inputs"]} - {"observation", "is_init"}
        return [carried_over_http(http, str(state), episode) for episode in range(2)]


def inputs(tensors: Arrays) -> list[Any]:
    made = []
    for name, array in tensors.items():
        made.append(triton.InferInput(name, list(array.shape), DATATYPES[array.dtype.name]))
        made[-1].set_data_from_numpy(array)
    return made


def read(result: Any) -> Arrays:
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def one(episode: int, step: int = 0) -> list[Any]:
    return inputs({"observation": observations(episode)[step]})


def flags(step: int) -> dict[str, bool]:
    return {"sequence_start": step == 0, "sequence_end": step == STEPS - 1}


def test_the_server_and_its_models_are_described_as_over_http(
    client: triton.InferenceServerClient, addresses: tuple[str, str]
) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    for name, version, ready in (("gru", "", True), ("gru", "1", True), ("gru", "2", False), ("chess", "", False)):
        assert client.is_model_ready(name, version) == ready
    with triton_http.InferenceServerClient(addresses[1]) as http:
        assert client.get_server_metadata(as_json=True) == http.get_server_metadata()
        metadata = http.get_model_metadata("gru")
        for part in (*metadata["inputs"], *metadata["outputs"]):
            part["shape"] = [str(extent) for extent in part["shape"]]  # int64 is text in protobuf's JSON
        assert client.get_model_metadata("gru", as_json=True) == metadata
        config = client.get_model_config("gru").config
        described = http.get_model_config("gru")
        assert (config.name, config.max_batch_size) == ("gru", described["max_batch_size"])
        assert [(i.name, list(i.dims), i.optional) for i in config.input] == [
            (i["name"], i["dims"], i["optional"]) for i in described["input"]
        ]
        assert [output.name for output in config.output] == [output["name"] for output in described["output"]]
    (model,) = client.get_model_repository_index().models
    assert (model.name, model.version, model.state) == ("gru", "1", "READY")


def test_state_that_the_client_carries(client: triton.InferenceServerClient, expected: list[list[Arrays]]) -> None:
    (state,) = {i.name for i in client.get_model_metadata("gru").inputs} - {"observation", "is_init"}
    hidden: Arrays = {}
    answers = []
    for observation in observations(0):
        answer = read(client.infer("gru", inputs({"observation": observation, **hidden})))
        hidden = {state: answer.pop(state)}
        answers.append(answer)
    same(answers, expected[0])


def test_what_is_asked_for_is_answered(client: triton.InferenceServerClient, stub: Any) -> None:
    batch = observations(0)[:5, 0]
    result = client.infer("gru", inputs({"observation": batch}), "1", request_id="42")
    whole, response = read(result), result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("42", "gru", "1")
    assert whole["action"].shape == (5,)
    wanted = [triton.InferRequestedOutput(name) for name in ("action_value", "action")]
    chosen = read(client.infer("gru", inputs({"observation": batch}), outputs=wanted))
    assert list(chosen) == ["action_value", "action"]
    same([chosen], [{name: whole[name] for name in chosen}])
    long = inputs({"observation": observations(0)[:, 0].repeat(3, 0)})
    for way in ("gzip", "deflate"):
        same([read(client.infer("gru", long, compression_algorithm=way))], [read(client.infer("gru", long))])
    contents = {"fp32_contents": batch.ravel().tolist()}
    tensor = {"name": "observation", "datatype": "FP32", "shape": batch.shape, "contents": contents}
    spelt_out = stub.ModelInfer(pb.ModelInferRequest(model_name="gru", inputs=[tensor]))
    same([read(triton.InferResult(spelt_out))], [whole])


def test_sequences_of_both_id_types(client: triton.InferenceServerClient, expected: list[list[Arrays]]) -> None:
    ids: list[int | str] = [7, "7"]
    answers: dict[int | str, list[Arrays]] = {id_: [] for id_ in ids}
    for step in range(STEPS):
        for episode, id_ in enumerate(ids):
            answers[id_].append(read(client.infer("gru", one(episode, step), sequence_id=id_, **flags(step))))
    for episode, id_ in enumerate(ids):
        same(answers[id_], expected[episode])
        with pytest.raises(InferenceServerException, match="no sequence '7' of gru: never begun, ended or timed out"):
            client.infer("gru", one(0), sequence_id=id_)


def test_a_sequence_may_go_on_over_the_other_protocol(
    client: triton.InferenceServerClient, addresses: tuple[str, str], expected: list[list[Arrays]]
) -> None:
    answers = []
    with triton_http.InferenceServerClient(addresses[1]) as http:
        for step in range(STEPS):
            if step % 2:
                answers.append(read(client.infer("gru", one(0, step), sequence_id=70, **flags(step))))
                continue
            observation = triton_http.InferInput("observation", [1, 4], "FP32")
            observation.set_data_from_numpy(observations(0)[step])
            result = http.infer("gru", [observation], sequence_id=70, **flags(step))
            answers.append({o["name"]: result.as_numpy(o["name"]) for o in result.get_response()["outputs"]})
    same(answers, expected[0])


def test_a_stream_answers_in_order_and_outlives_errors(
    client: triton.InferenceServerClient, expected: list[list[Arrays]]
) -> None:
    answered: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answered.put((result, error)))
    try:
        for step in range(STEPS):  # none waits for an answer
            for episode, id_ in enumerate((8, "8")):
                client.async_stream_infer(
                    "gru", one(episode, step), request_id=f"{episode}", sequence_id=id_, **flags(step)
                )
        client.async_stream_infer("chess", one(0))
        client.async_stream_infer("gru", one(0), sequence_id="nobody")
        client.async_stream_infer("gru", one(0), request_id="last")
        answers: list[list[Arrays]] = [[], []]
        for number in range(2 * STEPS):
            result, error = answered.get(timeout=60)
            assert error is None
            assert result.get_response().id == str(number % 2)
            answers[number % 2].append(read(result))
        same(answers[0], expected[0])
        same(answers[1], expected[1])
        for message in ("no policy named 'chess'; known: gru", "no sequence 'nobody' of gru: never begun"):
            result, error = answered.get(timeout=60)
            assert (result, message in error.message()) == (None, True)
        assert answered.get(timeout=60)[0].get_response().id == "last"
    finally:
        client.stop_stream()


def test_asyncio_drives_many_sequences_and_streams(address: str, expected: list[list[Arrays]]) -> None:
    async def episode(connected: triton_aio.InferenceServerClient, number: int) -> list[Arrays]:
        id_ = number + 1 if number % 2 else f"episode-{number}"
        answers = []
        for step in range(STEPS):
            answers.append(read(await connected.infer("gru", one(number % 2, step), sequence_id=id_, **flags(step))))
        return answers

    async def stream(connected: triton_aio.InferenceServerClient, number: int) -> list[Arrays]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            for step in range(STEPS):
                named = {"model_name": "gru", "inputs": one(number % 2, step), "sequence_id": 100 + number}
                yield {**named, **flags(step)}

        answers = []
        async for result, error in connected.stream_infer(requests()):
            assert error is None
            answers.append(read(result))
        return answers

    async def main() -> list[list[Arrays]]:
        async with triton_aio.InferenceServerClient(address) as connected:
            assert await connected.is_server_ready()
            assert (await connected.get_model_metadata("gru")).name == "gru"
            episodes = [episode(connected, number) for number in range(4)]
            return await asyncio.gather(*episodes, *(stream(connected, number) for number in range(4)))

    for number, answers in enumerate(asyncio.run(main())):
        same(answers, expected[number % 2])


def test_errors_have_their_codes_and_say_what_was_expected(client: triton.InferenceServerClient, stub: Any) -> None:
    good = one(0)
    narrow = inputs({"observation": np.zeros((1, 3), np.float32)})
    hazy = inputs({"observation": np.full((1, 4), np.nan, np.float32)})
    shared = triton.InferInput("observation", [1, 4], "FP32")
    shared.set_shared_memory("region", 16)
    refused: list[tuple[str, dict[str, Any], str, str]] = [
        ("chess", {"inputs": good}, "NOT_FOUND", "no policy named 'chess'; known: gru"),
        ("gru", {"inputs": good, "model_version": "5"}, "NOT_FOUND", "gru has no version '?5'?; known: 1"),
        ("gru", {"inputs": good, "model_version": "x"}, "NOT_FOUND", "gru has no version 'x'; known: 1"),
        ("gru", {"inputs": good, "sequence_id": "nobody"}, "NOT_FOUND", "no sequence 'nobody' of gru"),
        ("gru", {"inputs": inputs({"frame": observations(0)[0]})}, "INVALID_ARGUMENT", "frame: expected one of obs"),
        ("gru", {"inputs": narrow}, "INVALID_ARGUMENT", r"FP32\[-1, 4\]; got FP32\[1, 3\]"),
        ("gru", {"inputs": hazy}, "INVALID_ARGUMENT", "expected numbers; got NaN"),
        ("gru", {"inputs": [shared]}, "INVALID_ARGUMENT", "shared memory is not offered"),
        ("gru", {"inputs": good, "outputs": [triton.InferRequestedOutput("v")]}, "INVALID_ARGUMENT", "no output named"),
        (
            "gru",
            {"inputs": good, "outputs": [triton.InferRequestedOutput("action", class_count=2)]},
            "INVALID_ARGUMENT",
            "action: classification is not offered",
        ),
        ("gru", {"inputs": good, "parameters": {"seed": "x"}}, "INVALID_ARGUMENT", "expected a seed of 0"),
        ("gru", {"inputs": good, "timeout": 1}, "DEADLINE_EXCEEDED", "expected an answer within the timeout of 1 µs"),
    ]
    for name, arguments, code, message in refused:
        with pytest.raises(InferenceServerException, match=message) as caught:
            client.infer(name, **arguments)
        assert caught.value.status() == f"StatusCode.{code}"
    with pytest.raises(InferenceServerException, match="no policy named 'chess'"):
        client.get_model_config("chess")
    with pytest.raises(InferenceServerException, match="not offered; the extensions offered are binary") as caught:
        client.register_system_shared_memory("region", "/key", 16)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    assert client.infer("gru", good, priority=1, timeout=60_000_000).as_numpy("action").shape == (1,)


def test_messages_are_bounded_before_and_after_they_are_expanded(stub: Any) -> None:
    request = pb.ModelInferRequest(model_name="gru", raw_input_contents=[bytes(40 << 20)])
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request, compression=compression)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_answer_that_comes_too_late_does_not_move_the_sequence(
    client: triton.InferenceServerClient, expected: list[list[Arrays]]
) -> None:
    answers = []
    for step in range(STEPS):
        if step:
            with pytest.raises(InferenceServerException, match="within the timeout of 1 µs") as caught:
                client.infer("gru", one(0, step), sequence_id=9, timeout=1)
            assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        answers.append(read(client.infer("gru", one(0, step), sequence_id=9, client_timeout=60, **flags(step))))
    same(answers, expected[0])


def test_statistics_count_both_protocols(client: triton.InferenceServerClient, addresses: tuple[str, str]) -> None:
    def success(name: str) -> Any:
        (found,) = client.get_inference_statistics(name).model_stats
        assert (found.name, found.version) == ("gru", "1")
        return found.inference_stats.success

    before = success("gru")
    client.infer("gru", one(0))
    with triton_http.InferenceServerClient(addresses[1]) as http:
        (counted,) = http.get_inference_statistics("gru")["model_stats"]
    after = success("")
    assert after.count == before.count + 1 == counted["inference_stats"]["success"]["count"]
    assert after.ns > before.ns


def test_workers_share_the_port_and_what_was_accepted_is_answered_when_they_end(gru_store: ModelStore) -> None:
    port = local.free_port()
    answered: queue.Queue[tuple[Any, Any]] = queue.Queue()
    options = ("--runtime", "onnx", "--workers", "2", "--grpc-port", str(port))
    with (
        local.serve(gru_store.root, *options) as running,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        until(lambda: client.is_model_ready("gru"))  # also the worker that has the connection
        client.start_stream(lambda result, error: answered.put((result, error)))
        client.async_stream_infer("gru", one(0))
        assert answered.get(timeout=60)[1] is None
        os.kill(running.pid, signal.SIGTERM)
        _, error = answered.get(timeout=60)  # at once, though the client has not ended the stream
        assert (error.status(), "the service is closing" in error.message()) == ("StatusCode.UNAVAILABLE", True)
        client.stop_stream()
