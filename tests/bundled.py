"""The outputs of sessions of the service, step by step, with which the tests of bundles compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np

from actserve.atari.emulator import AtariGame
from actserve.core.completion import complete, step_seed
from actserve.core.environment import Environment
from actserve.core.signature import Arrays, Exploration
from actserve.engine import golden
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from tests.exported import exported
from tests.shipped import SHIPPED

POLICIES = (
    "tutorial_lstm",
    "gaussian_noise",
    "tanh_normal",
    "epsilon_greedy",
    "masked_categorical",
    "ornstein_uhlenbeck",
    "nested",
)


def artifact_of(name: str) -> Artifact:
    """A policy that ships, or one of tests/policies.py."""
    if name.startswith("pong"):
        return ModelStore(SHIPPED).resolve(name)
    return exported(f"tests.policies:{name}", ("onnx",)).resolve(name.replace("_", "-"))


def observations(artifact: Artifact, steps: int) -> list[Arrays]:
    """Observations of one item for each step, (*shape) each."""
    rng = np.random.default_rng(5)
    specs = artifact.manifest.signature.observations
    return [{spec.name: spec.sample(rng, 1)[0] for spec in specs} for _ in range(steps)]


@contextmanager
def stepping(artifact: Artifact, exploration: Exploration | None, seed: int) -> Iterator[Callable[[Arrays], Arrays]]:
    """A function that takes the observations of one item, and gives all outputs, each (*shape), with the state kept."""
    signature = artifact.manifest.signature
    runtime = golden.load("onnx", artifact, 1)
    steps = count(1)
    state: Arrays = {}

    def step(tensors: Arrays) -> Arrays:
        nonlocal state
        batch = {name: np.asarray(array)[None] for name, array in tensors.items()}
        inputs = complete(signature, batch | state, 1, exploration, step_seed(seed, next(steps))).inputs
        outputs = runtime.run(inputs)
        state = {part.spec.name: outputs[part.output] for part in signature.state}
        return {spec.name: outputs[spec.name][0] for spec in signature.outputs}

    yield step
    runtime.close()


def session(
    artifact: Artifact, seen: Sequence[Arrays], exploration: Exploration | None = None, seed: int = 0
) -> list[Arrays]:
    """The outputs of an episode, (*shape) each, as a session of the service with this seed gives them."""
    with stepping(artifact, exploration, seed) as step:
        return [step(tensors) for tensors in seen]


def screens(artifact: Artifact, steps: int, seed: int) -> tuple[list[Arrays], list[int]]:
    """The screens of a game that the artifact plays in a session with `seed`, and its actions."""
    game = AtariGame(atari(artifact), seed)
    seen: list[Arrays] = []
    actions: list[int] = []
    with stepping(artifact, None, seed) as step:
        while len(seen) < steps and not game.over:
            seen.append({"pixels": game.screen().copy()})
            actions.append(int(step(seen[-1])["action"]))
            game.act(actions[-1])
    return seen, actions


def atari(artifact: Artifact) -> Environment:
    environment = artifact.manifest.environment
    assert isinstance(environment, Environment)
    return environment


def flip_a_weight(folder: Path, file: str = "policy.onnx") -> None:
    """Change one weight of a bundle's program, and its hash with it: only the golden samples can tell."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(folder / file))
    weights = max(
        (tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT),
        key=lambda tensor: np.prod(tensor.dims),
    )
    array = numpy_helper.to_array(weights).copy()
    array.flat[np.argmax(np.abs(array))] *= -30
    weights.CopyFrom(numpy_helper.from_array(array, weights.name))
    data = model.SerializeToString()
    (folder / file).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
