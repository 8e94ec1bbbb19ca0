"""What a bundle must do: the outputs that a session of the service gives, step by step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actserve.core.completion import complete, step_seed
from actserve.core.signature import Arrays, Exploration
from actserve.engine import golden
from actserve.store.artifact import Artifact

POLICIES = (
    "tutorial_lstm",
    "gaussian_noise",
    "tanh_normal",
    "epsilon_greedy",
    "masked_categorical",
    "ornstein_uhlenbeck",
    "nested",
)


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
