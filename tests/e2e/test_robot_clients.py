"""Robots' clients, as they come from the registry, against the service as it is started.

Each has an environment of its own: `make .venv/openpi/installed`, and so on.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from actserve import RemotePolicy
from actserve.cli.tools import local_service as local
from actserve.core.signature import Array, Arrays
from actserve.server.access.tokens import add_token
from tests.command_line import actserve
from tests.exported import exported
from tests.policies_robots import SIZE
from tests.robot_clients import Gr00tClient

ROOT = Path(__file__).parent.parent.parent
STEPS = 500
CLIENTS = {  # the module in `robots`, by environment
    "openpi": "openpi",
    "vla-eval": "vla_eval",
    "positronic": "positronic",
    "json-numpy": "json_numpy_client",
    "gr00t": "gr00t",
}


class Service:
    """A service with the policy `robot`, a token for it, and one episode with its actions by `RemotePolicy`."""

    def __init__(self, runtime: str, port: int, gr00t_port: int, token: str) -> None:
        self.port, self.gr00t_port, self.token = port, gr00t_port, token
        # In company a .pt2 differs in the last bits; alone it does not: tests/test_robot_wires.py.
        self.tolerance = 0.0 if runtime == "onnx" else 1e-5
        rng = np.random.default_rng(0)
        self.episode: Arrays = {
            "image": rng.integers(0, 256, (STEPS, SIZE, SIZE, 3), np.uint8),
            "wrist_image": rng.integers(0, 256, (STEPS, SIZE, SIZE, 3), np.uint8),
            "state": rng.standard_normal((STEPS, 5)).astype(np.float32),
        }
        self.actions = self.play()

    def play(self) -> Array:
        """(STEPS, HORIZON, DIM), by `RemotePolicy`."""
        with RemotePolicy(f"http://127.0.0.1:{self.port}", token=self.token) as policy:
            episode = policy.episode()
            seen = ({f"observation_{name}": a[i] for name, a in self.episode.items()} for i in range(STEPS))
            return np.stack([episode.act(step) for step in seen])


@pytest.fixture(scope="module", params=["onnx", pytest.param("pt2", marks=pytest.mark.wide)])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    runtime = request.param
    store = exported("tests.policies_robots:robot", ["onnx"] if runtime == "onnx" else ["onnx", "pt2"])
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    token, gr00t_port = add_token(tokens, "arm"), local.free_port()
    options = ["--runtime", runtime, "--tokens", str(tokens), "--gr00t-port", str(gr00t_port)]
    with local.serve(store.root, *options, "--ignore", "prompt,task_description") as up:
        yield Service(runtime, int(up.url.rpartition(":")[2]), gr00t_port, token)


@pytest.mark.parametrize("client", CLIENTS)
def test_an_episode_of_a_robots_own_client(service: Service, client: str, tmp_path: Path) -> None:
    """While it plays, and is told what is wrong, and is cut off, another client plays the same episode."""
    python = ROOT / ".venv" / client / "bin" / "python"
    if not python.exists():
        pytest.skip(f"the client is not installed: make .venv/{client}/installed")
    np.savez(tmp_path / "episode.npz", allow_pickle=False, **service.episode)
    port = service.gr00t_port if client == "gr00t" else service.port
    module = f"tests.e2e.robots.{CLIENTS[client]}"
    command = [str(python), "-m", module, str(port), service.token, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    others: list[Array] = []
    done = threading.Event()

    def play_on() -> None:
        while not done.is_set():
            others.append(service.play())

    thread = threading.Thread(target=play_on)
    thread.start()
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=600, check=False, env=environment, cwd=ROOT
        )
    finally:
        done.set()
        thread.join()
    assert result.returncode == 0, result.stderr
    for actions in (np.load(tmp_path / "actions.npy"), *others, service.play()):
        np.testing.assert_allclose(actions, service.actions, rtol=0, atol=service.tolerance)
    told = json.loads(result.stdout)
    assert "expected a valid token" in told["token"]
    assert "observation_image: expected" in told["shape"]
    assert "23" in told["shape"]
    assert "observation_state: expected float32[5]; got nothing" in told["missing"]
    assert "Traceback" not in result.stdout


def test_workers_share_the_port_of_gr00t(tmp_path: Path) -> None:
    """Each connection is one worker's, and keeps its episode there."""
    store, port = exported("tests.policies_robots:robot", ["onnx"]), local.free_port()
    rng = np.random.default_rng(1)
    seen: list[Arrays] = [
        {
            "image": rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
            "wrist_image": rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
            "state": rng.standard_normal(5).astype(np.float32),
        }
        for _ in range(5)
    ]
    with local.serve(store.root, "--runtime", "onnx", "--workers", "2", "--gr00t-port", str(port)) as service:
        with RemotePolicy(service.url) as policy:
            episode = policy.episode()
            expected = [episode.act({f"observation_{name}": a for name, a in step.items()}) for step in seen]
        with ExitStack() as stack:
            clients = [stack.enter_context(Gr00tClient(0, port)) for _ in range(12)]
            for step, action in zip(seen, expected, strict=True):
                for client in clients:
                    np.testing.assert_array_equal(client.act(**step), action)
        command = ["serve", "--store", str(store.root), "--port", "0", "--gr00t-port", str(port)]
        refused = actserve(*command)
        assert refused.returncode == 2
        assert f"cannot listen on 127.0.0.1, port {port} for GR00T's protocol: Address already in use" in refused.stderr
