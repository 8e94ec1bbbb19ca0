from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actserve import wire
from actserve.client.async_remote_policy import AsyncRemotePolicy
from actserve.client.remote_policy import RemotePolicy
from actserve.core.environment import Environment, GameAction
from actserve.core.errors import InvalidTensor, ServiceError, ServiceUnreachable, UsageError
from tests.fake_service import SIGNATURE, FakeService, running

ITEM = np.arange(12, dtype=np.uint8).reshape(4, 3)


@pytest.fixture
def service() -> Iterator[FakeService]:
    with running(FakeService()) as fake:
        yield fake


def test_the_default_policy_is_found_and_described(service: FakeService) -> None:
    service.environment = {"id": "ALE/X-v5", "game": "x", "screen": "pixels", "actions": [{"meaning": "A", "code": 3}]}
    with RemotePolicy(service.url) as policy:
        assert (policy.name, policy.version, policy.runtime, policy.description.reason) == (
            "fake",
            3,
            "onnx",
            "so told",
        )
        assert policy.environment == Environment("ALE/X-v5", "x", "pixels", (GameAction("A", 3),))
        assert policy.signature.observations[0].shape == (4, 3)
    assert [path for _, path, _ in service.requests] == ["/policies", "/policies/fake"]


def test_a_named_policy_is_described_once_and_called_by_its_name(service: FakeService) -> None:
    with RemotePolicy(service.url, "fake") as policy:
        policy.act(ITEM)
        policy.act(ITEM)
    assert [path for _, path, _ in service.requests] == ["/policies/fake", *["/policies/fake/act"] * 2]
    assert service.connections == 1


def test_an_observation_is_posted_raw_and_gives_a_plain_number(service: FakeService) -> None:
    with RemotePolicy(service.url) as policy:
        action = policy.act(ITEM)
        assert policy.act(np.asfortranarray(ITEM)) == action  # the wire is row-major whatever the array was
    assert action == 66 % 6
    assert type(action) is int
    assert service.bodies == [ITEM.tobytes()] * 2
    assert service.requests[-1][2]["content-type"] == "application/octet-stream; dtype=uint8"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_gives_an_array(service: FakeService, size: int) -> None:
    batch = np.random.default_rng(0).integers(0, 256, (size, 4, 3), np.uint8)
    with RemotePolicy(service.url) as policy:
        actions = policy.act(batch)
        assert actions.dtype == np.int64
        assert actions.tolist() == [policy.act(item) for item in batch]


def test_a_continuous_action_is_an_array_of_its_dtype(service: FakeService) -> None:
    service.signature = {**SIGNATURE, "outputs": [{"name": "torque", "dtype": "float32", "shape": [2]}]}
    service.act = lambda body: (200, {"torque": [0.5, -1] if len(body) == 12 else [[0.5, -1]] * 2})
    with RemotePolicy(service.url) as policy:
        one, two = policy.act(ITEM), policy.act(np.stack([ITEM, ITEM]))
    assert (one.dtype, one.tolist(), two.shape) == (np.float32, [0.5, -1], (2, 2))


def test_several_observations_go_by_name(service: FakeService) -> None:
    speed = {"name": "speed", "dtype": "float32", "shape": []}
    service.signature = {**SIGNATURE, "observations": [*SIGNATURE["observations"], speed]}
    service.act = lambda _body: (200, {"action": 1})
    with RemotePolicy(service.url) as policy:
        assert policy.act({"pixels": ITEM, "speed": np.float32(0.5) * np.ones((), np.float32)}) == 1
        with pytest.raises(UsageError, match="pixels, speed: give them by name"):
            policy.act(ITEM)
    (body,) = service.bodies
    items = wire.decode(wire.SAFETENSORS, body, policy.signature)
    assert items.tensors["pixels"].tolist() == [ITEM.tolist()]
    assert items.tensors["speed"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (ITEM.astype(np.float32), r"expected uint8\[B, 4, 3\]; got float32\[1, 4, 3\]"),
        (ITEM.T, r"got uint8\[1, 3, 4\]"),
        (ITEM[None, None], r"got uint8\[1, 1, 4, 3\]"),
        (np.empty((0, 4, 3), np.uint8), "at least one item"),
    ],
)
def test_what_the_policy_does_not_take_is_not_sent(service: FakeService, observation: Any, message: str) -> None:
    with RemotePolicy(service.url) as policy, pytest.raises(InvalidTensor, match=message):
        policy.act(observation)
    assert service.acts == 0


def test_the_services_errors_come_as_they_are(service: FakeService) -> None:
    service.act = lambda _body: (503, {"error": {"code": "overloaded", "message": "try again", "detail": {}}})
    with RemotePolicy(service.url) as policy, pytest.raises(ServiceError, match="503 overloaded: try again") as error:
        policy.act(ITEM)
    assert (error.value.status, error.value.reason) == (503, "overloaded")
    with pytest.raises(ServiceError, match="404 unknown_policy"):
        RemotePolicy(service.url, "../admin").__enter__()
    assert service.requests[-1][1] == "/policies/..%2Fadmin"


def test_an_answer_of_something_else_is_said_to_be_that(service: FakeService) -> None:
    service.act = lambda _body: (502, b"<html>Bad gateway</html>")
    with RemotePolicy(service.url) as policy:
        with pytest.raises(ServiceError, match="502 http_error: <html>Bad gateway"):
            policy.act(ITEM)
        service.act = lambda _body: (200, b"hello")
        with pytest.raises(ServiceError, match="unintelligible: expected JSON; got hello"):
            policy.act(ITEM)
        service.act = lambda _body: (200, {"value": 3})
        with pytest.raises(ServiceError, match="expected 'action' as int64"):
            policy.act(ITEM)
    service.signature = {**SIGNATURE, "state_of_tomorrow": []}
    with pytest.raises(ServiceError, match="expected a policy description that this version of the client can read"):
        RemotePolicy(service.url).__enter__()


def test_a_connection_that_was_closed_while_idle_is_opened_again(service: FakeService) -> None:
    service.closes_after = 3  # without a word, after two GETs and one action
    with RemotePolicy(service.url) as policy:
        assert [policy.act(ITEM) for _ in range(8)] == [0] * 8
    assert service.acts == 8
    assert 3 <= service.connections <= 5


def test_the_asynchronous_client_opens_it_again_too(service: FakeService) -> None:
    service.closes_after = 3

    async def act() -> list[int]:
        async with AsyncRemotePolicy(service.url) as policy:
            return [await policy.act(ITEM) for _ in range(8)]

    assert asyncio.run(act()) == [0] * 8
    assert service.acts == 8


def test_a_service_that_never_answers_is_asked_twice_at_most(service: FakeService) -> None:
    with RemotePolicy(service.url) as policy:
        policy.act(ITEM)

        def fail(_body: bytes) -> tuple[int, Any]:
            raise ConnectionError  # the fake drops the connection

        service.act, service.acts = fail, 0
        with pytest.raises(ServiceUnreachable, match="no answer from http"):
            policy.act(ITEM)
    assert service.acts == 2


def test_a_unix_socket_serves_as_well(tmp_path: Path) -> None:
    socket_path = str(tmp_path / "s")
    with running(FakeService(uds=socket_path)), RemotePolicy("http://fake", uds=socket_path) as policy:
        assert policy.act(ITEM) == 0
    with pytest.raises(ServiceUnreachable, match="no answer from http://fake through"):
        RemotePolicy("http://fake", uds=str(tmp_path / "nothing")).__enter__()


def test_nobody_there_and_no_url() -> None:
    with socket.socket() as taken:  # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ServiceUnreachable, match="refused"):
            RemotePolicy(f"http://127.0.0.1:{taken.getsockname()[1]}").__enter__()
    for url in ("localhost", "ftp://127.0.0.1", "http://", "http://[", "http://127.0.0.1:x"):
        with pytest.raises(UsageError, match="expected a URL such as"):
            RemotePolicy(url).__enter__()
