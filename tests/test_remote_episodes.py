"""Episodes through both clients, by every way to keep the state, against the same policy run alone."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import urllib3
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from actserve.client import remote_policy as remotes
from actserve.client.async_remote_policy import AsyncRemotePolicy
from actserve.client.operations import HttpResponse
from actserve.client.remote_policy import RemotePolicy
from actserve.client.sequence import OipSequence
from actserve.client.state_carriers import STATE_CARRIERS
from actserve.client.transport import HttpConnection
from actserve.core.errors import (
    InvalidTensor,
    ProxyFailed,
    ServiceError,
    ServiceUnreachable,
    UnknownOutput,
    UsageError,
)
from actserve.core.signature import Exploration
from tests.fake_policy import NAME, Alone, seen
from tests.stream_service import Service, running

SEED = 5
XS = [int(x) for x in np.random.default_rng(0).integers(0, 1000, 40)]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as up:
        yield up


@pytest.fixture
def policy(service: Service) -> Iterator[RemotePolicy]:
    with RemotePolicy(service.url) as remote:
        yield remote


def alone(exploration: Exploration | None) -> list[tuple[int, list[float]]]:
    """Action and value of every step."""
    policy = Alone(1, SEED, exploration)
    taken = [policy.take(seen(x)) for x in XS]
    return [(int(outputs["action"][0]), outputs["value"][0].tolist()) for outputs in taken]


@pytest.mark.parametrize("exploration", [None, "random"])
@pytest.mark.parametrize("way", STATE_CARRIERS)
def test_every_way_is_one_and_the_same_episode(policy: RemotePolicy, way: str, exploration: Exploration | None) -> None:
    found = []
    with STATE_CARRIERS[way](policy, outputs=["value"], exploration=exploration, seed=SEED) as acting:
        for x in XS:
            action = acting.act(np.array(x))
            found.append((action, acting.outputs["value"].tolist()))
    assert found == alone(exploration)
    assert all(type(action) is int for action, _ in found)


def test_nothing_is_held_once_the_episode_is_over(policy: RemotePolicy) -> None:
    with policy.session(owner="me") as session:
        session.act(np.array(1))
        held = urllib3.request("GET", f"{policy.url}/policies/{NAME}/sessions", headers={"X-Owner": "me"}).json()
        assert [one["session"] for one in held["sessions"]] == [session.id]
    with pytest.raises(ServiceError, match="410 session_expired"):
        session.act(np.array(1))
    with OipSequence(policy) as sequence:
        sequence.act(np.array(1))
    with pytest.raises(ServiceError, match="never begun, ended or timed out"):
        sequence.act(np.array(1))


def test_a_step_whose_answer_is_lost_is_taken_once(policy: RemotePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = HttpConnection.exchange
    lost: list[Any] = []

    def lose(connection: HttpConnection, request: Any) -> Any:
        response = exchange(connection, request)
        if request.headers.get("X-Step") == "3" and len(lost) < remotes.MAX_ATTEMPTS - 1:
            lost.append(response)
            raise ServiceUnreachable("lost on its way")
        return response

    monkeypatch.setattr(HttpConnection, "exchange", lose)
    with policy.session(seed=SEED) as session:
        assert [session.act(np.array(x)) for x in XS] == [action for action, _ in alone(None)]
    assert len(lost) == 2


@pytest.mark.parametrize("way", ["episode", "session"])
def test_a_step_that_a_proxy_lost_is_asked_for_again(
    policy: RemotePolicy, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The service has taken some of them, and others never came to it."""
    exchange = HttpConnection.exchange
    asked = 0

    def lose(connection: HttpConnection, request: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked % 3 == 0:
            return HttpResponse(502, "text/html", b"<html>Bad gateway")
        response = exchange(connection, request)
        return HttpResponse(500, "text/plain", b"Internal Server Error") if asked % 3 == 1 else response

    with contextlib.ExitStack() as stack:
        acting: Any = policy.episode() if way == "episode" else stack.enter_context(policy.session(seed=SEED))
        with monkeypatch.context() as patched:
            patched.setattr(HttpConnection, "exchange", lose)
            actions = [acting.act(np.array(x)) for x in XS]
            patched.setattr(
                HttpConnection, "exchange", lambda *_: HttpResponse(500, "text/plain", b"Internal Server Error")
            )
            with pytest.raises(ProxyFailed, match="500 http_error: Internal"):
                acting.act(np.array(1))
    assert actions == [action for action, _ in alone(None)]


def test_a_step_that_fails_moves_nothing(policy: RemotePolicy) -> None:
    for way in STATE_CARRIERS.values():
        with way(policy, seed=SEED) as acting:
            for x, (action, _) in zip(XS[:5], alone(None), strict=False):
                with pytest.raises(InvalidTensor, match="at most 999"):
                    acting.act(np.array(1000))
                assert acting.act(np.array(x)) == action


def test_an_episode_begins_anew_where_it_is_told_to(policy: RemotePolicy) -> None:
    episode = policy.episode()
    expected = Alone(1, SEED, None)
    for index, x in enumerate(XS):
        outputs = expected.take(seen(x, index % 7 == 0))
        action = episode.act({"x": np.array(x), "is_init": np.array(index % 7 == 0)})
        assert action == outputs["action"][0]


def test_a_batch_of_episodes_steps_together(policy: RemotePolicy) -> None:
    """State in, state out, for k at once."""
    tensors = {"x": np.array(XS[:3])}
    models = [Alone(1, SEED, None) for _ in range(3)]
    for _ in range(4):
        results = policy.step(tensors, ["value"])
        for row, model in enumerate(models):
            outputs = model.take(seen(XS[row]))
            assert results["action"][row] == outputs["action"][0]
            assert results["value"][row].tolist() == outputs["value"][0].tolist()
        tensors = {"x": np.array(XS[:3]), "digest": results["digest"], "odd": results["odd"]}
    with pytest.raises(UnknownOutput, match="gives action, value"):
        policy.step(tensors, ["valu"])


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_a_tensordict_goes_in_and_comes_out(policy: RemotePolicy, batch: tuple[int, ...]) -> None:
    """As through a TorchRL module: outputs beside the observation, the new state under "next"."""
    step = TensorDict({"x": torch.full(batch, 7)}, batch_size=batch)
    models = [Alone(1, SEED, None) for _ in range(int(np.prod(batch)))]
    for _ in range(3):
        assert policy(step) is step
        outputs = [model.take(seen(7)) for model in models]
        assert step["action"].reshape(-1).tolist() == [int(o["action"][0]) for o in outputs]
        assert step["value"].shape == (*batch, 2)
        assert step["next", "digest"].dtype == torch.int64
        assert step["policy_version"].shape == batch
        assert set(step["policy_version"].reshape(-1).tolist()) == {policy.version}
        step = step["next"].set("x", torch.full(batch, 7))
    with pytest.raises(UsageError, match="expected x in the TensorDict; got y"):
        policy(TensorDict({"y": torch.zeros(())}))
    with pytest.raises(UsageError, match=r"x: expected int64\[\] for batch size \[2\]; got \(2, 5\)"):
        policy(TensorDict({"x": torch.zeros(2, 5)}, batch_size=(2,)))


def test_a_tensordict_is_explored_as_torchrl_says(policy: RemotePolicy) -> None:
    def drawn(kind: ExplorationType) -> set[int]:
        with set_exploration_type(kind):
            return {int(policy(TensorDict({"x": torch.tensor(7)}))["action"]) for _ in range(8)}

    once = {int(policy(TensorDict({"x": torch.tensor(7)}))["action"])}
    assert drawn(ExplorationType.DETERMINISTIC) == drawn(ExplorationType.MODE) == once
    assert len(drawn(ExplorationType.RANDOM)) > 1


def test_a_pickled_copy_has_a_connection_of_its_own(service: Service) -> None:
    with RemotePolicy(service.url) as policy:
        copy = pickle.loads(pickle.dumps(policy))
        assert copy.act(np.array(7)) == policy.act(np.array(7))
        assert copy.act(np.array(8)) == policy.act(np.array(8))
    with copy:
        assert copy.version == 1


def test_the_asynchronous_client_does_the_same(service: Service) -> None:
    async def play(policy: AsyncRemotePolicy) -> list[tuple[int, list[float]]]:
        episode = policy.episode(["value"], exploration="random", seed=SEED)
        return [(await episode.act(np.array(x)), episode.outputs["value"].tolist()) for x in XS]

    async def run() -> None:
        async with AsyncRemotePolicy(service.url) as policy:
            assert await asyncio.gather(*(play(policy) for _ in range(8))) == [alone("random")] * 8
            assert await policy.act(np.array(XS[0])) == alone(None)[0][0]
            step = await policy(TensorDict({"x": torch.tensor(XS[0])}))
            assert int(step["action"]) == alone(None)[0][0]
            with pytest.raises(InvalidTensor):
                await policy.act(np.array(1.0))
        with pytest.raises(ServiceUnreachable):
            async with AsyncRemotePolicy("http://127.0.0.1:9"):
                pass
        for url in ("localhost", "ftp://127.0.0.1", "http://["):
            with pytest.raises(UsageError, match="expected a URL such as"):
                async with AsyncRemotePolicy(url):
                    pass

    asyncio.run(run())
