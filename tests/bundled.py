"""What a bundle must do: the outputs that a session of the service gives, step by step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
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


def session(
    artifact: Artifact, seen: Sequence[Arrays], exploration: Exploration | None = None, seed: int = 0
) -> list[Arrays]:
    """The outputs of an episode, (*shape) each, as a session of the service with this seed gives them."""
    signature = artifact.manifest.signature
    runtime = golden.load("onnx", artifact, 1)
    state: Arrays = {}
    found = []
    for step, tensors in enumerate(seen, 1):
        batch = {name: np.asarray(array)[None] for name, array in tensors.items()}
        inputs = complete(signature, batch | state, 1, exploration, step_seed(seed, step)).inputs
        outputs = runtime.run(inputs)
        state = {part.spec.name: outputs[part.output] for part in signature.state}
        found.append({spec.name: outputs[spec.name][0] for spec in signature.outputs})
    runtime.close()
    return found


def screens(artifact: Artifact, steps: int, seed: int) -> tuple[list[Arrays], list[int]]:
    """The screens of a game that the artifact plays in a session with `seed`, and its actions."""
    signature = artifact.manifest.signature
    game = AtariGame(atari(artifact), seed)
    runtime = golden.load("onnx", artifact, 1)
    seen: list[Arrays] = []
    actions: list[int] = []
    state: Arrays = {}
    while len(seen) < steps and not game.over:
        screen = game.screen().copy()
        inputs = complete(signature, {"pixels": screen[None]} | state, 1, None, step_seed(seed, len(seen) + 1)).inputs
        outputs = runtime.run(inputs)
        state = {part.spec.name: outputs[part.output] for part in signature.state}
        seen.append({"pixels": screen})
        actions.append(int(outputs["action"][0]))
        game.act(actions[-1])
    runtime.close()
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
