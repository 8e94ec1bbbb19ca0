"""The service on a real Ray cluster of two nodes on this machine: replicas are killed while games are played."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3

from actserve.atari.play import Act, play
from actserve.client.remote_policy import Episode, RemotePolicy, RemoteSession
from actserve.client.stream import Stream
from actserve.core.completion import complete
from actserve.core.environment import Environment, game_of
from actserve.core.errors import ServiceError, ServiceUnreachable
from actserve.core.signature import Array, Arrays
from actserve.engine.runtimes.load import load
from actserve.server.sessions.ids import home_of
from actserve.store.local import ModelStore
from tests import waiting
from tests.scale_service import PYTHON, Scaled, environment, running
from tests.shipped import SHIPPED

NAME = "pong-lstm"
NODES = (2, 1)  # CPUs; of three replicas, two on one node and one on the other
SEED = 3
STEPS, KILLED_AT = 120, 40
STREAMS = 6
RESTARTED_WITHIN_S = 240.0
until = partial(waiting.until, within_s=RESTARTED_WITHIN_S)
SCREEN = np.zeros((210, 160, 3), np.uint8)
RAW = "application/octet-stream"

pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(not PYTHON.exists(), reason="Ray is not installed: make .venv/ray/installed"),
]


@pytest.fixture(scope="module")
def scaled() -> Iterator[Scaled]:
    with running(NODES, store=str(SHIPPED), replicas=3, runtime="onnx", policy=NAME, max_body_bytes=1 << 20) as found:
        yield found


@pytest.fixture(scope="module")
def game() -> Environment:
    found = game_of(ModelStore(SHIPPED).resolve(NAME).manifest.environment)
    assert found is not None
    return found


def alone() -> Act:
    """The program in this process, and the state beside it."""
    runtime = load("onnx", ModelStore(SHIPPED).resolve(NAME))
    signature = runtime.signature
    state: Arrays = {}

    def act(screen: Array) -> int:
        results = runtime.run(complete(signature, {"pixels": screen[None], **state}, 1).inputs)
        state.update({one.spec.name: results[one.output] for one in signature.state})
        return int(results[signature.action.name][0])

    return act


class Player:
    """A game, and how far it is."""

    def __init__(self, act: Act) -> None:
        self._act = act
        self.actions: list[int] = []
        self.refused: set[str] = set()  # why a step was asked for again

    def play(self, game: Environment) -> list[int]:
        play(lambda _seed: self.act, game, episodes=1, seed=SEED, max_steps=STEPS)
        return self.actions

    def act(self, screen: Array) -> int:
        deadline = time.monotonic() + RESTARTED_WITHIN_S
        while True:
            try:
                action = int(self._act(screen))
            except ServiceError as error:
                if error.status != 503 or time.monotonic() > deadline:
                    raise
                self.refused.add(error.reason)
                time.sleep(0.05)
            else:
                self.actions.append(action)
                return action


def begin_at(policy: RemotePolicy, home: int) -> RemoteSession:
    """Any replica begins sessions, each at its home."""
    for _ in range(100):
        session = policy.session()
        if home_of(session.id) == home:
            return session
        session.end()
    raise AssertionError("a hundred sessions have begun elsewhere")


def test_the_contracts_are_those_of_the_service(scaled: Scaled) -> None:
    """Before any replica is killed."""
    with urllib3.PoolManager(retries=False) as http:

        def ask(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
            response = http.request(method, scaled.url + path, body=body, headers=headers)
            return response.status, json.loads(response.data)

        raw = {"Content-Type": RAW}
        status, answer = ask("POST", "/act?outputs=action,action_value", SCREEN.tobytes(), **raw)
        assert (status, answer["action"]) == (200, alone()(SCREEN))
        status, answer = ask("POST", "/act", b"short", **raw)
        assert (status, answer["error"]["code"]) == (422, "invalid_tensor")
        status, answer = ask("POST", "/act", bytes(2 << 20), **raw)
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        status, answer = ask("POST", "/act", SCREEN.tobytes(), **raw, **{"X-Session": "never issued"})
        assert (status, answer["error"]["code"]) == (404, "unknown_session")
        assert ask("GET", "/readyz") == (200, {"status": "ready"})
        assert ask("GET", f"/v2/models/{NAME}/ready")[0] == 200
        assert ask("GET", "/v2/models/none")[0] == 404
        metrics = http.request("GET", f"{scaled.url}/metrics").data.decode()
        assert 'actserve_policy_info{policy="pong-lstm",runtime="onnx",version="1"} 1.0' in metrics


def test_games_go_on_over_killed_replicas(scaled: Scaled, game: Environment) -> None:
    expected = Player(alone()).play(game)
    replicas = scaled.replicas()
    homes = [replica.home for replica in replicas]
    (lonely,) = (replica for replica in replicas if homes.count(replica.home) == 1)
    doomed = next(replica for replica in replicas if homes.count(replica.home) == 2)
    with ExitStack() as stack:
        policies = [stack.enter_context(RemotePolicy(scaled.url, NAME)) for _ in range(3)]
        sessions = [begin_at(policies[1], doomed.home), begin_at(policies[2], lonely.home)]
        streams = [stack.enter_context(Stream(scaled.url, NAME)) for _ in range(STREAMS)]
        episodes: list[Episode | RemoteSession] = [policies[0].episode(), *sessions]
        players = carried, shared, alone_there = [Player(episode.act) for episode in episodes]
        pool = stack.enter_context(ThreadPoolExecutor(len(players)))
        games = [pool.submit(player.play, game) for player in players]
        until(lambda: all(len(player.actions) >= KILLED_AT for player in players))
        for replica in (doomed, lonely):
            os.kill(replica.pid, signal.SIGKILL)
        assert len(alone_there.actions) < STEPS
        for played in games:
            assert played.result() == expected
        assert carried.refused == shared.refused == set()
        assert alone_there.refused == {"session_elsewhere"}
        for session in sessions:
            session.end()
        over = [is_over(stream) for stream in streams]
        assert any(over)
        assert not all(over)


def is_over(stream: Stream) -> bool:
    """Whether its replica was killed; else it answers."""
    try:
        stream.act(SCREEN)
    except ServiceUnreachable:
        return True
    return False


def test_haproxy_passes_requests_sessions_and_streams_to_the_replicas_of_a_node() -> None:
    act = alone()
    expected = [act(SCREEN) for _ in range(6)]
    with ExitStack() as stack:
        arguments = {"store": str(SHIPPED), "replicas": 2, "runtime": "onnx", "policy": NAME}
        url = stack.enter_context(running((2,), haproxy=True, **arguments)).url
        until(lambda: urllib3.request("GET", f"{url}/readyz").status == 200)
        policies = [stack.enter_context(RemotePolicy(url, NAME)) for _ in range(4)]
        episodes: list[Any] = [policies[0].episode(), *(policy.session() for policy in policies[1:])]
        episodes += [stack.enter_context(Stream(url, NAME)) for _ in range(2)]
        for episode in episodes:
            assert [int(episode.act(SCREEN)) for _ in expected] == expected
        refused = urllib3.request("POST", f"{url}/act", body=b"short", headers={"Content-Type": RAW}, retries=False)
        assert (refused.status, refused.json()["error"]["code"]) == (422, "invalid_tensor")


def test_wrong_arguments_are_refused_before_anything_starts(tmp_path: Path) -> None:
    code = """
import json, sys
from actserve.core.errors import UsageError
from actserve.server.ray import read_arguments

for arguments in json.loads(sys.argv[1]):
    try:
        scale, settings = read_arguments(arguments)
        print(scale.replicas, settings.store, settings.policy, settings.poll_s)
    except UsageError as error:
        print(str(error).splitlines()[0])
"""
    store = {"store": str(tmp_path)}
    tried = [
        {**store, "replicas": "2", "policy": "cart"},
        {**store, "replica": 2},
        {**store, "replicas": 0},
        {**store, "runtime": "jax"},
        {**store, "grpc_port": 8001},
        {"store": "nowhere"},
    ]
    done = subprocess.run(
        [str(PYTHON), "-c", code, json.dumps(tried)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(str(tmp_path)) | {"ACTSERVE_POLL_S": "7", "ACTSERVE_POLICY": "other"},
        timeout=600,
    )
    good, *refused = done.stdout.splitlines()
    assert good == f"2 {tmp_path} cart 7.0", done.stderr
    reasons = ["got ['replica']", "for Scale", "ACTSERVE_RUNTIME: ", "expected no grpc_port", "no model store"]
    for line, why in zip(refused, reasons, strict=True):
        assert why in line
