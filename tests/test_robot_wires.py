"""Robots' wires: every wire, with one recurrent policy that has two cameras and a state, beside `RemotePolicy`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
import uvicorn
from fastapi import FastAPI
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from actserve import RemotePolicy
from actserve.cli.tools.local_service import free_port
from actserve.core.settings import Settings
from actserve.core.signature import Array
from actserve.server.access.tokens import add_token
from actserve.server.app import create_app
from actserve.server.memory import STREAM_BYTES
from tests.exported import exported
from tests.policies_robots import HORIZON, SIZE
from tests.robot_clients import CLIENTS, Gr00tClient
from tests.robot_sockets import OpenpiClient, Refused, RobotClient
from tests.serving import port_of, serving
from tests.waiting import until

STEPS = 500
RUNTIMES = ["onnx", pytest.param("pt2", marks=pytest.mark.wide)]


@dataclass(frozen=True)
class Service:
    port: int
    zmq_port: int
    token: str
    app: FastAPI
    server: uvicorn.Server

    def client(self, wire: str, token: str | None = None) -> RobotClient:
        return CLIENTS[wire](self.port, self.zmq_port, token or self.token)

    @property
    def address(self) -> tuple[int, int, str]:
        return self.port, self.zmq_port, self.token

    @property
    def held_bytes(self) -> int:
        memory = self.app.state.admission.memory
        return int(memory.taken_bytes)


@contextmanager
def running(folder: Path, runtime: str = "onnx", **changes: Any) -> Iterator[Service]:
    store = exported("tests.policies_robots:robot", [runtime] if runtime == "onnx" else ["onnx", "pt2"])
    token, zmq_port = add_token(folder / "tokens", "arm"), free_port()
    settings = Settings.model_validate(
        {
            "store": str(store.root),
            "runtime": runtime,
            "tokens": folder / "tokens",
            "gr00t_port": zmq_port,
            "ignore": "prompt",
            "max_wait_ms": 60_000,
            **changes,
        }
    )
    app = create_app(settings)
    with serving(app) as server:
        port = port_of(server)
        until(lambda: urllib3.request("GET", f"http://127.0.0.1:{port}/readyz").status == 200)
        yield Service(port, zmq_port, token, app, server)


@pytest.fixture(scope="module", params=RUNTIMES)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service"), request.param) as up:
        yield up


Observation = dict[str, Array]


def observations(seed: int, steps: int) -> list[Observation]:
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
            "wrist_image": rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
            "state": rng.standard_normal(5).astype(np.float32),
        }
        for _ in range(steps)
    ]


def expected(service: Service, seen: list[Observation]) -> list[Array]:
    """The actions of one episode, by `RemotePolicy`."""
    with RemotePolicy(f"http://127.0.0.1:{service.port}", token=service.token) as policy:
        episode = policy.episode()
        return [episode.act({f"observation_{name}": value for name, value in step.items()}) for step in seen]


EPISODE = observations(0, STEPS)


@pytest.fixture(scope="module")
def actions(service: Service) -> list[Array]:
    found = expected(service, EPISODE)
    assert len(np.unique(np.stack(found)[:, 0], axis=0)) == STEPS, "or it proves little"
    alone = expected(service, EPISODE[-1:])
    assert not np.array_equal(alone[0], found[-1]), "the state matters"
    return found


@pytest.mark.parametrize("wire", CLIENTS)
def test_an_episode_is_that_of_a_remote_policy(service: Service, actions: list[Array], wire: str) -> None:
    with service.client(wire) as client:
        for step, (seen, action) in enumerate(zip(EPISODE, actions, strict=True)):
            np.testing.assert_array_equal(client.act(**seen), action, err_msg=f"step {step}")
        client.reset()
        for seen, action in zip(EPISODE[:3], actions, strict=False):
            np.testing.assert_array_equal(client.act(**seen), action)


@pytest.mark.parametrize("wire", CLIENTS)
def test_what_is_wrong_is_told_and_nobody_else_notices(service: Service, actions: list[Array], wire: str) -> None:
    """Another client of the same wire plays on meanwhile, and the client itself afterwards."""
    first, *rest = zip(EPISODE[:8], actions, strict=False)
    held_bytes = service.held_bytes
    others = iter(rest)

    def others_play_on() -> None:
        seen, action = next(others)
        np.testing.assert_array_equal(other.act(**seen), action)

    with service.client(wire) as other, service.client(wire) as client:
        np.testing.assert_array_equal(other.act(**first[0]), first[1])
        seen = first[0]
        np.testing.assert_array_equal(client.act(**seen), first[1])
        without_state = {"image": seen["image"], "wrist_image": seen["wrist_image"]}
        wrong: list[tuple[dict[str, Any], str]] = [
            (
                {**seen, "image": seen["image"][:-1]},
                r"observation_image: expected .*got (uint8\[23, 24|23 rows)",
            ),
            ({**seen, "state": np.zeros(6, np.float32)}, r"observation_state: expected float32\[5\]; got float32\["),
            (without_state, r"observation_state: expected float32\[5\]; got nothing"),
        ]
        if wire != "vla-eval":
            wrong.append(({**seen, "speed": np.zeros(2)}, "speed: expected one of the inputs observation_image, "))
        for values, error in wrong:
            with pytest.raises(Refused, match=error):
                client.act(**values)
            others_play_on()
        with pytest.raises(Refused, match=r"expected (a msgpack message|JSON)") as refused:
            client.garbage()
        assert "Traceback" not in str(refused.value)
        others_play_on()
        np.testing.assert_array_equal(client.act(**EPISODE[1]), actions[1], err_msg="the state has not changed")
        client.cut()
        others_play_on()
    if "GR00T" not in wire:  # whose connections end silently
        until(lambda: service.held_bytes <= held_bytes)


@pytest.mark.parametrize("wire", CLIENTS)
def test_a_wrong_token_is_told(service: Service, wire: str) -> None:
    with pytest.raises(Refused, match="expected a valid token"), service.client(wire, "wrong") as client:
        client.act(**EPISODE[0])


@pytest.mark.parametrize("wire", CLIENTS)
def test_many_clients_keep_their_own_states(service: Service, wire: str) -> None:
    episodes = [observations(seed, 4) for seed in range(1, 7)]
    known = [expected(service, episode) for episode in episodes]
    with ExitStack() as stack:
        clients = [stack.enter_context(service.client(wire)) for _ in episodes]
        for step in range(4):
            for client, episode, action in zip(clients, episodes, known, strict=True):
                np.testing.assert_array_equal(client.act(**episode[step]), action[step])


def test_names_that_are_ignored_are(service: Service) -> None:
    with OpenpiClient(*service.address) as client:
        assert client.act(**EPISODE[0], prompt="pick up the cup").shape[0] == HORIZON


def test_metadata_and_modalities_describe_the_policy(service: Service) -> None:
    with OpenpiClient(*service.address) as client:
        assert client.metadata["inputs"]["observation_image"] == "uint8[24, 24, 3]"
    with Gr00tClient(*service.address) as client:
        modalities = client.call("get_modality_config")
        assert modalities["action"]["as_json"] == {"delta_indices": [0, 1, 2, 3], "modality_keys": ["action"]}
        with pytest.raises(Refused, match=r"expected an endpoint of ping, .*; got 'kill'"):
            client.call("kill")
        with pytest.raises(Refused, match="expected no options"):
            client.call("get_action", {"observation": {}, "options": {"n": 1}})


def test_a_robot_that_is_idle_is_told(tmp_path: Path) -> None:
    with running(tmp_path, session_idle_s=0.3) as service:
        with OpenpiClient(*service.address) as client:
            client.act(**EPISODE[0])
            with pytest.raises(ConnectionClosed, match=r"1001.*idle for 0\.3 s"):
                client.socket.recv(60)
        with Gr00tClient(*service.address) as client:
            client.act(**EPISODE[0])
            until(lambda: service.held_bytes < STREAM_BYTES)
            with pytest.raises(Refused, match=r"this session is gone: it was idle for 0\.3 s"):
                client.act(**EPISODE[0])
            client.reset()
            client.act(**EPISODE[0])


def test_the_service_answers_what_it_has_received_and_says_that_it_restarts(tmp_path: Path) -> None:
    with running(tmp_path) as service, OpenpiClient(*service.address) as client:
        client.act(**EPISODE[0])
        service.server.should_exit = True
        with pytest.raises(ConnectionClosed, match=r"1012.*service restart"):
            client.socket.recv(60)


def test_a_policy_that_is_not_there_is_told_before_the_connection_opens(service: Service) -> None:
    with (
        pytest.raises(InvalidStatus, match="404") as refused,
        connect(
            f"ws://127.0.0.1:{service.port}/policies/chess/openpi",
            proxy=None,
            additional_headers={"Authorization": f"Bearer {service.token}"},
        ),
    ):
        pass
    assert b"no policy named 'chess'" in refused.value.response.body


def test_answers_and_refusals_are_counted_by_policy_and_wire(service: Service) -> None:
    for wire, transport, route in (
        ("openpi", "websocket", "/policies/{name}/openpi"),
        ("vla-eval", "websocket", "/policies/{name}/vla-eval"),
        ("GR00T", "zeromq", "get_action"),
    ):
        tally = service.app.state.registry.counts.tally("robot", transport, route)
        answered, refused = tally.answered, tally.reasons["invalid_tensor"]
        with service.client(wire) as client:
            client.act(**EPISODE[0])
            with pytest.raises(Refused):
                client.act(**{**EPISODE[0], "state": np.zeros(6, np.float32)})
        assert (tally.answered, tally.reasons["invalid_tensor"]) == (answered + 1, refused + 1)


def test_a_message_that_is_too_large_ends_the_connection_only(service: Service, actions: list[Array]) -> None:
    with OpenpiClient(*service.address) as other, OpenpiClient(*service.address) as client:
        with pytest.raises(Refused, match="1009"):
            client.receive(bytes(2 << 20))
        np.testing.assert_array_equal(other.act(**EPISODE[0]), actions[0])
