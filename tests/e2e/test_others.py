"""Policies of other libraries, from their files to the service: the answers are the library's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import urllib3
from stable_baselines3 import PPO
from typer.testing import CliRunner

from actserve.cli.main import cli
from actserve.cli.tools import local_service as local
from actserve.client.remote_policy import RemotePolicy
from actserve.core.completion import complete
from actserve.core.signature import Array
from actserve.engine import golden
from actserve.engine.runtimes.load import load
from actserve.store.artifact import MANIFEST
from actserve.store.local import ModelStore
from actserve_export.publish import export
from actserve_export.sources.sb3 import from_sb3
from actserve_export.targets import find_source
from tests import sb3_models, test_modules
from tests.exported import made_once
from tests.shipped import SHIPPED

OBSERVATIONS = 200


@pytest.fixture(scope="module")
def cartpole() -> Path:
    """A folder with `ppo_cartpole.zip`, trained for a few seconds, and `store`, to which the command exported it."""
    return made_once("cartpole", make_cartpole, [Path(__file__)])


def make_cartpole(folder: Path) -> None:
    zipped, store = folder / "ppo_cartpole.zip", folder / "store"
    PPO("MlpPolicy", "CartPole-v1", n_steps=512, seed=0, device="cpu").learn(4096).save(zipped)
    done = CliRunner().invoke(cli, ["export", str(zipped), "--store", str(store), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["name"], found["published"]) == ("ppo-cartpole", True)


def played(model: PPO) -> Array:
    """The model's observations while it plays, (200, 4) float32."""
    environment = gymnasium.make("CartPole-v1")
    seen: list[Array] = []
    ended = True
    while len(seen) < OBSERVATIONS:
        if ended:
            observation, _ = environment.reset(seed=len(seen))
        seen.append(observation)
        action, _ = model.predict(observation, deterministic=True)
        observation, _, terminated, truncated, _ = environment.step(int(action))
        ended = terminated or truncated
    environment.close()
    return np.stack(seen)


def test_the_certificate_says_what_was_compared_with_what(cartpole: Path) -> None:
    artifact = ModelStore(cartpole / "store").resolve("ppo-cartpole")
    certificate = artifact.manifest.certificate
    assert artifact.manifest.provenance["origin"] == "ppo_cartpole.zip"
    assert set(certificate["programs"]) == {"onnx", "pt2"}
    assert certificate["original"]["name"].endswith("predict(deterministic=True)")
    assert certificate["original"]["compared"] == certificate["samples"] >= 64
    assert certificate["original"]["action_disagreements"] == 0
    assert certificate["statistics"]["p"] > certificate["statistics"]["level"]


def test_a_model_trained_with_stable_baselines3_acts_as_it_predicts(cartpole: Path) -> None:
    model = PPO.load(cartpole / "ppo_cartpole.zip", device="cpu")
    observations = played(model)
    expected, _ = model.predict(observations, deterministic=True)
    assert 0 < expected.mean() < 1
    with (
        local.serve(cartpole / "store", "--runtime", "onnx") as service,
        RemotePolicy(service.url, "ppo-cartpole") as policy,
    ):
        assert [int(policy.act(observation)) for observation in observations] == expected.tolist()
    artifact = ModelStore(cartpole / "store").resolve("ppo-cartpole")
    compiled = load("pt2", artifact)
    inputs = complete(artifact.manifest.signature, {"observation": observations}, OBSERVATIONS).inputs
    np.testing.assert_array_equal(compiled.run(inputs)["action"], expected)
    compiled.close()


@pytest.fixture(scope="module")
def store() -> Path:
    """Images and forces of Stable-Baselines3, CleanRL's network, and a file, each as `.onnx`."""
    modules = [Path(str(file)) for file in (__file__, sb3_models.__file__, test_modules.__file__)]
    return made_once("others", make_others, [*modules, ModelStore(SHIPPED).resolve("pong").folder / MANIFEST])


def make_others(folder: Path) -> None:
    store = ModelStore(folder)
    with TemporaryDirectory() as other:
        files = Path(other)
        for kind, name in (("dqn, images", "images"), ("sac", "forces")):
            sb3_models.MODELS[kind]().save(files / f"{name}.zip")
            source = from_sb3(files / f"{name}.zip", channels_last=True)
            export(source, name, store, origin=f"{name}.zip", runtimes=["onnx"])
        _, module = find_source("tests.test_modules:q_network", action="argmax")
        export(module, "values", store, origin="tests.test_modules:q_network", runtimes=["onnx"])
        (files / "pong.onnx").write_bytes(ModelStore(SHIPPED).resolve("pong").read_program("onnx"))
        _, file = find_source(str(files / "pong.onnx"))
        export(file, "file", store, origin="pong.onnx")


@pytest.fixture(scope="module")
def url(store: Path) -> Iterator[str]:
    with local.serve(store, "--runtime", "onnx") as service:
        yield service.url


def ask(url: str, name: str, observations: Array) -> Any:
    """The actions for a batch, as bytes go over the wire."""
    response = urllib3.request(
        "POST",
        f"{url}/policies/{name}/act",
        body=np.ascontiguousarray(observations).tobytes(),
        headers={"Content-Type": "application/octet-stream"},
    )
    assert response.status == 200, response.data
    return np.array(json.loads(response.data)["action"])


@pytest.mark.parametrize(("kind", "name"), [("dqn, images", "images"), ("sac", "forces")])
def test_what_stable_baselines3_does_around_the_network_is_in_the_program(url: str, kind: str, name: str) -> None:
    model = sb3_models.MODELS[kind]()
    rng = np.random.default_rng(3)
    if name == "images":
        observations = (rng.integers(0, 256, (50, 40, 36, 3)) * rng.random((50, 1, 1, 1))).astype(np.uint8)
    else:
        observations = rng.standard_normal((50, 5)).astype(np.float32)
    expected, _ = model.predict(observations, deterministic=True)
    np.testing.assert_allclose(ask(url, name, observations), expected, atol=1e-5)


def test_cleanrls_network_is_served(url: str) -> None:
    observations = torch.randn(OBSERVATIONS, 4, generator=torch.Generator().manual_seed(1))
    expected = test_modules.QNetwork()(observations).argmax(1)
    np.testing.assert_array_equal(ask(url, "values", observations.numpy()), expected.numpy())


def test_a_file_is_served(url: str) -> None:
    inputs, outputs = golden.read(ModelStore(SHIPPED).resolve("pong"))
    np.testing.assert_array_equal(ask(url, "file", inputs["pixels"]), outputs["action"])
