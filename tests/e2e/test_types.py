"""Policies that take and give narrow types, on every wire: each answer is the policy's own, to the last bit."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import tritonclient.grpc
import tritonclient.http
import urllib3
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from actserve import RemotePolicy, Stream
from actserve.cli.tools import local_service as local
from actserve.client.sequence import OipSequence
from actserve.core.signature import Array
from actserve.store.local import ModelStore
from actserve_export.publish import export
from actserve_export.sources.policy_source import PolicySource

STEPS = 5
STATEFUL, STATELESS = ("bfloat16", "float16", "uint16"), ("bfloat16", "int8", "int16")
DATATYPES = {"bfloat16": "BF16", "float16": "FP16", "uint16": "UINT16", "int8": "INT8", "int16": "INT16"}


class Mean(nn.Module):
    """The action is a function of the observations so far: their mean, in which the last ones count most."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, observation: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        after = (mean.float() * 0.25 + observation.float() * 0.5).to(self.dtype)
        return (after.float() * 0.75 + 1).to(self.dtype), after


class Scaled(nn.Module):
    def forward(self, observation: Tensor) -> Tensor:
        return (observation.float() * 0.7 + 1).to(observation.dtype)


def source(kind: str, dtype: str) -> PolicySource:
    zeros = torch.zeros(3, dtype=getattr(torch, dtype))
    if kind == "scaled":
        return PolicySource(TensorDictModule(Scaled(), ["observation"], ["action"]), TensorDict({"observation": zeros}))
    module = TensorDictModule(Mean(zeros.dtype), ["observation", "mean"], ["action", ("next", "mean")])
    return PolicySource(module, TensorDict({"observation": zeros, "mean": zeros}))


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(the URL, the address of gRPC) of a service with all the policies."""
    store = ModelStore(tmp_path_factory.mktemp("types"))
    for kind, dtypes in (("mean", STATEFUL), ("scaled", STATELESS)):
        for dtype in dtypes:
            export(source(kind, dtype), f"{kind}-{dtype}", store, origin="x", runtimes=["onnx"])
    grpc_port = str(local.free_port())
    with local.serve(store.root, "--policy", "scaled-int8", "--grpc-port", grpc_port) as service:
        yield service.url, f"127.0.0.1:{grpc_port}"


def observations(dtype: str, count: int = STEPS) -> Tensor:
    """(count, 3)."""
    numbers = torch.randn(count, 3, generator=torch.Generator().manual_seed(1)) * 50
    return (numbers.abs() if dtype == "uint16" else numbers).to(getattr(torch, dtype))


def arrays(tensor: Tensor) -> Array:
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def expected(kind: str, dtype: str, count: int = STEPS) -> list[Array]:
    """The actions of the policy itself."""
    policy = source(kind, dtype).policy
    state, found = TensorDict({"mean": torch.zeros(1, 3, dtype=getattr(torch, dtype))}), []
    for observation in observations(dtype, count):
        result = policy(TensorDict({"observation": observation[None], **state}, batch_size=[1]))
        state = result.get("next", state)
        found.append(arrays(result["action"][0]))
    return found


def by_episode(url: str, _: str, dtype: str) -> list[Any]:
    with RemotePolicy(url, f"mean-{dtype}") as policy:
        episode = policy.episode()
        return [episode.act(arrays(observation)) for observation in observations(dtype)]


def by_session(url: str, _: str, dtype: str) -> list[Any]:
    with RemotePolicy(url, f"mean-{dtype}") as policy, policy.session() as session:
        return [session.act(arrays(observation)) for observation in observations(dtype)]


def by_stream(url: str, _: str, dtype: str) -> list[Any]:
    with Stream(url, f"mean-{dtype}") as stream:
        return [stream.act(arrays(observation)) for observation in observations(dtype)]


def by_tensordict(url: str, _: str, dtype: str) -> list[Any]:
    found: list[Any] = []
    state: dict[str, Any] = {}
    with RemotePolicy(url, f"mean-{dtype}") as policy:
        for observation in observations(dtype):
            result = policy(TensorDict({"observation": observation, **state}))
            assert result["action"].dtype == result["next", "mean"].dtype == observation.dtype
            state = {"mean": result["next", "mean"]}
            found.append(arrays(result["action"]))
    return found


def by_sequence(url: str, _: str, dtype: str) -> list[Any]:
    with RemotePolicy(url, f"mean-{dtype}") as policy, OipSequence(policy) as sequence:
        return [sequence.act(arrays(observation)) for observation in observations(dtype)]


def by_json(url: str, _: str, dtype: str) -> list[Any]:
    """Numbers and base64 in turn."""
    found: list[Any] = []
    state: dict[str, Any] = {}
    for step, observation in enumerate(observations(dtype)):
        data = base64.b64encode(observation.view(torch.uint8).numpy().tobytes()).decode()
        packed = {"dtype": dtype, "shape": [3], "b64": data}
        document = {"observation": packed if step % 2 else observation.tolist(), **state}
        answer = urllib3.request("POST", f"{url}/policies/mean-{dtype}/act", json=document).json()
        state = {"mean": answer["mean"]}
        found.append(np.array(answer["action"]))
    return found


def by_triton(made: Any, client: Any, dtype: str) -> list[Any]:
    found = []
    for step, observation in enumerate(observations(dtype)):
        given = made.InferInput("observation", [1, 3], DATATYPES[dtype])
        given.set_data_from_numpy(arrays(observation)[None])
        result = client.infer(f"mean-{dtype}", [given], sequence_id=9, sequence_start=step == 0)
        found.append(result.as_numpy("action")[0])
    client.close()
    return found


def by_oip(url: str, _: str, dtype: str) -> list[Any]:
    client = tritonclient.http.InferenceServerClient(url.removeprefix("http://"))
    return by_triton(tritonclient.http, client, dtype)


def by_grpc(_: str, address: str, dtype: str) -> list[Any]:
    return by_triton(tritonclient.grpc, tritonclient.grpc.InferenceServerClient(address), dtype)


WAYS = [by_episode, by_session, by_stream, by_tensordict, by_sequence, by_json, by_oip, by_grpc]


@pytest.mark.parametrize("dtype", STATEFUL)
@pytest.mark.parametrize("way", WAYS)
def test_state_of_a_narrow_type(ports: tuple[str, str], way: Callable[..., list[Any]], dtype: str) -> None:
    for ours, theirs in zip(way(*ports, dtype), expected("mean", dtype), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", STATELESS)
@pytest.mark.parametrize("count", [1, STEPS])
def test_bodies_are_the_bytes_of_the_type(ports: tuple[str, str], dtype: str, count: int) -> None:
    """Raw bytes on the fast path, and safetensors as torch writes and reads them."""
    url = f"{ports[0]}/policies/scaled-{dtype}/act"
    given = observations(dtype, count)
    actions = expected("scaled", dtype, count)
    body = given.view(torch.uint8).numpy().tobytes()
    assert len(body) == given.nbytes
    answer = urllib3.request("POST", url, body=body, headers={"Content-Type": "application/octet-stream"}).json()
    np.testing.assert_array_equal(np.reshape(answer["action"], (count, 3)), actions)
    headers = {"Content-Type": "application/safetensors", "Accept": "application/safetensors"}
    packed = urllib3.request("POST", url, body=safetensors.torch.save({"observation": given}), headers=headers).data
    tensor = safetensors.torch.load(packed)["action"]
    assert tensor.dtype == given.dtype
    np.testing.assert_array_equal(arrays(tensor), actions)
    headers["Accept"] = "application/octet-stream"
    raw = urllib3.request("POST", url, body=safetensors.torch.save({"observation": given}), headers=headers).data
    assert raw == tensor.view(torch.uint8).numpy().tobytes()


def test_an_array_of_ml_dtypes_is_taken_too(ports: tuple[str, str]) -> None:
    given = arrays(observations("bfloat16"))
    with RemotePolicy(ports[0], "scaled-bfloat16") as policy:
        np.testing.assert_array_equal(policy.act(given.astype(ml_dtypes.bfloat16)), policy.act(given))


def test_numbers_beyond_the_type_are_refused(ports: tuple[str, str]) -> None:
    for dtype, number in (("bfloat16", 3.4e38), ("int8", 128), ("int16", -40_000)):
        url = f"{ports[0]}/policies/scaled-{dtype}/act"
        answer = urllib3.request("POST", url, json={"observation": [number, 0, 0]})
        assert answer.status == 422, (dtype, answer.data)
        assert "observation: expected -" in json.loads(answer.data)["error"]["message"]
