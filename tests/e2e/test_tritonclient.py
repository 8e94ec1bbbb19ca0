"""tritonclient, as it comes from the registry, against the service as it is started."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
import urllib3
from tritonclient.utils import InferenceServerException

from actserve.cli.tools import local_service as local
from actserve.core.signature import Array, Arrays
from actserve.store.local import ModelStore

STEPS = 40
DATATYPES = {"float32": "FP32", "uint8": "UINT8"}


@pytest.fixture(scope="module", params=["onnx", "pt2"])
def address(request: pytest.FixtureRequest, gru_store: ModelStore) -> Iterator[str]:
    """Host and port, as tritonclient wants it."""
    with local.serve(gru_store.root, "--runtime", request.param) as running:
        yield running.url.removeprefix("http://")


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address, concurrency=4) as connected:
        yield connected


@pytest.fixture(scope="module")
def state(client: triton.InferenceServerClient) -> str:
    """The name of the policy's state."""
    (name,) = {i["name"] for i in client.get_model_metadata("gru")["inputs"]} - {"observation", "is_init"}
    return str(name)


def observations(episode: int) -> Array:
    """(STEPS, 1, 4) float32."""
    return np.random.default_rng(episode).standard_normal((STEPS, 1, 4)).astype(np.float32)


def inputs(tensors: Arrays, binary: bool = True) -> list[Any]:
    made = []
    for name, array in tensors.items():
        made.append(triton.InferInput(name, list(array.shape), DATATYPES[array.dtype.name]))
        made[-1].set_data_from_numpy(array, binary_data=binary)
    return made


def read(result: Any) -> Arrays:
    return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}


def carried(client: triton.InferenceServerClient, state: str, episode: int) -> list[Arrays]:
    """An episode whose state the client carries: what every other way must give."""
    hidden: Arrays = {}
    answers = []
    for observation in observations(episode):
        answer = read(client.infer("gru", inputs({"observation": observation, **hidden})))
        hidden = {state: answer.pop(state)}
        answers.append(answer)
    return answers


def same(one: list[Arrays], other: list[Arrays]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_allclose(array, theirs[name], rtol=1e-5, atol=1e-6)
            assert array.dtype == theirs[name].dtype


def test_the_server_and_its_models_are_described(client: triton.InferenceServerClient, state: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("gru")
    assert client.is_model_ready("gru", "1")
    assert not client.is_model_ready("gru", "2")
    assert not client.is_model_ready("chess")
    assert client.get_server_metadata()["name"] == "actserve"
    metadata = client.get_model_metadata("gru")
    assert metadata["versions"] == ["1"]
    assert {i["name"]: (i["datatype"], i["shape"][0]) for i in metadata["inputs"]} == {
        "observation": ("FP32", -1),
        state: ("FP32", -1),
        "is_init": ("BOOL", -1),
    }
    assert metadata["outputs"][0] == {"name": "action", "datatype": "INT64", "shape": [-1]}
    assert client.get_model_config("gru")["max_batch_size"] > 1
    assert client.get_model_repository_index() == [{"name": "gru", "version": "1", "state": "READY", "reason": ""}]


def test_json_and_binary_say_the_same(client: triton.InferenceServerClient) -> None:
    batch = observations(0)[:5, 0]
    expected = read(client.infer("gru", inputs({"observation": batch})))
    names = list(expected)
    for binary_in in (True, False):
        for binary_out in (True, False):
            outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in names]
            result = client.infer("gru", inputs({"observation": batch}, binary_in), outputs=outputs, request_id="42")
            same([read(result)], [expected])
            assert result.get_response()["id"] == "42"
    mixed = [triton.InferRequestedOutput(n, binary_data=n == "action") for n in names]
    same([read(client.infer("gru", inputs({"observation": batch}), "1", outputs=mixed))], [expected])
    only = read(client.infer("gru", inputs({"observation": batch}), outputs=[triton.InferRequestedOutput("action")]))
    assert list(only) == ["action"]


@pytest.mark.parametrize("way", ["gzip", "deflate"])
def test_bodies_may_be_compressed(client: triton.InferenceServerClient, way: str) -> None:
    batch = observations(0)[:, 0].repeat(3, 0)
    expected = read(client.infer("gru", inputs({"observation": batch})))
    ways = {"request_compression_algorithm": way, "response_compression_algorithm": way}
    for binary in (True, False):
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in expected]
        same([read(client.infer("gru", inputs({"observation": batch}, binary), outputs=outputs, **ways))], [expected])


def test_sequences_of_both_id_types_act_like_the_state_that_a_client_carries(
    client: triton.InferenceServerClient, state: str
) -> None:
    ids: list[int | str] = [7, "7"]
    answers: dict[int | str, list[Arrays]] = {id_: [] for id_ in ids}
    for step in range(STEPS):
        for episode, id_ in enumerate(ids):
            flags = {"sequence_id": id_, "sequence_start": step == 0, "sequence_end": step == STEPS - 1}
            result = client.infer("gru", inputs({"observation": observations(episode)[step]}), **flags)
            answers[id_].append(read(result))
    for episode, id_ in enumerate(ids):
        same(answers[id_], carried(client, state, episode))
        with pytest.raises(InferenceServerException, match="no sequence '7' of gru: never begun, ended or timed out"):
            client.infer("gru", inputs({"observation": observations(0)[0]}), sequence_id=id_)
    last = observations(0)[-1]
    without_state = read(client.infer("gru", inputs({"observation": last})))["action_value"]
    assert not np.allclose(answers[7][-1]["action_value"], without_state), "without memory any way would agree"


def test_requests_that_do_not_wait_for_each_other(client: triton.InferenceServerClient) -> None:
    batch = observations(0)[:8]
    waiting = [client.async_infer("gru", inputs({"observation": observation})) for observation in batch]
    answers = [read(request.get_result()) for request in waiting]
    expected = read(client.infer("gru", inputs({"observation": batch[:, 0]})))
    same(answers, [{name: array[index : index + 1] for name, array in expected.items()} for index in range(8)])


def test_asyncio_drives_many_sequences_at_once(client: triton.InferenceServerClient, address: str, state: str) -> None:
    async def episode(connected: triton_aio.InferenceServerClient, number: int) -> list[Arrays]:
        answers = []
        for step, observation in enumerate(observations(number)):
            flags = {"sequence_start": step == 0, "sequence_end": step == STEPS - 1}
            id_ = number + 1 if number % 2 else f"episode-{number}"
            result = await connected.infer("gru", inputs({"observation": observation}), sequence_id=id_, **flags)
            answers.append(read(result))
        return answers

    async def main() -> list[list[Arrays]]:
        async with triton_aio.InferenceServerClient(address) as connected:
            assert await connected.is_server_ready()
            assert (await connected.get_model_metadata("gru"))["name"] == "gru"
            compressed = await connected.infer(
                "gru",
                inputs({"observation": observations(0)[:, 0].repeat(3, 0)}),
                request_compression_algorithm="gzip",
                response_compression_algorithm="deflate",
            )
            assert len(read(compressed)["action"]) == 3 * STEPS
            return await asyncio.gather(*(episode(connected, number) for number in range(8)))

    for number, answers in enumerate(asyncio.run(main())):
        same(answers, carried(client, state, number))


def test_errors_say_what_was_expected(client: triton.InferenceServerClient) -> None:
    good = inputs({"observation": observations(0)[0]})
    narrow = inputs({"observation": np.zeros((1, 3), np.float32)})
    screens = inputs({"observation": np.zeros((1, 4), np.uint8)})
    hazy = inputs({"observation": np.full((1, 4), np.nan, np.float32)})
    classes = [triton.InferRequestedOutput("action", class_count=2)]
    value = [triton.InferRequestedOutput("value")]
    refused: list[tuple[str, dict[str, Any], str, str]] = [
        ("chess", {"inputs": good}, "404", "no policy named 'chess'; known: gru"),
        ("gru", {"inputs": good, "model_version": "5"}, "404", "gru has no version '?5'?; known: 1"),
        ("gru", {"inputs": inputs({"frame": observations(0)[0]})}, "400", "frame: expected one of observation"),
        ("gru", {"inputs": narrow}, "400", r"FP32\[-1, 4\]; got FP32\[1, 3\]"),
        ("gru", {"inputs": screens}, "400", r"FP32\[-1, 4\]; got UINT8\[1, 4\]"),
        ("gru", {"inputs": hazy}, "400", "expected numbers; got NaN"),
        ("gru", {"inputs": good, "outputs": value}, "400", "no output named 'value'; this policy gives action"),
        ("gru", {"inputs": good, "outputs": classes}, "400", "action: classification is not offered"),
        ("gru", {"inputs": good, "sequence_id": "nobody"}, "404", "no sequence 'nobody' of gru"),
        ("gru", {"inputs": good, "timeout": 1}, "503", "expected an answer within the timeout of 1 µs"),
    ]
    for name, arguments, status, message in refused:
        with pytest.raises(InferenceServerException, match=message) as caught:
            client.infer(name, **arguments)
        assert caught.value.status() == status
    shared = triton.InferInput("observation", [1, 4], "FP32")
    shared.set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException, match="no shared memory region 'region' is registered"):
        client.infer("gru", [shared])
    with pytest.raises(InferenceServerException, match="expected a client on the Unix socket, or one with a token"):
        client.register_system_shared_memory("region", "/key", 16)
    with pytest.raises(InferenceServerException, match="no such route; the extensions offered are"):
        client.register_cuda_shared_memory("region", b"handle", 0, 16)
    with pytest.raises(InferenceServerException, match="no such route"):
        client.load_model("gru")
    assert client.infer("gru", good, priority=1, timeout=60_000_000).as_numpy("action").shape == (1,)


def test_statistics_count_requests(client: triton.InferenceServerClient) -> None:
    def success() -> dict[str, int]:
        (found,) = client.get_inference_statistics("gru")["model_stats"]
        counted: dict[str, int] = found["inference_stats"]["success"]
        return counted

    before = success()
    client.infer("gru", inputs({"observation": observations(0)[0]}))
    assert success()["count"] == before["count"] + 1
    assert success()["ns"] > before["ns"]


def test_screens_of_pong_get_the_actions_of_the_plain_route(service: local.LocalService, screens: Array) -> None:
    wanted = [triton.InferRequestedOutput("action")]
    with (
        triton.InferenceServerClient(service.url.removeprefix("http://")) as client,
        urllib3.PoolManager(retries=False, headers={"Content-Type": "application/octet-stream"}) as http,
    ):
        actions = [client.infer("pong", inputs({"pixels": screen[None]}), outputs=wanted) for screen in screens]
        plain = [http.request("POST", f"{service.url}/act", body=screen.tobytes()).json() for screen in screens]
    assert [int(action.as_numpy("action")[0]) for action in actions] == [answer["action"] for answer in plain]
    assert len({answer["action"] for answer in plain}) > 1
