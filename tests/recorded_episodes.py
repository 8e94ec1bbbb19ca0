"""Recordings of episodes of any signature, with known values, for the tests of exports and replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actserve.core.environment import Contract
from actserve.core.signature import IS_INIT, Arrays, Signature, TensorSpec
from actserve.engine.recorders import Feedback
from actserve.recording.recorder import Recorder
from actserve.recording.writer import Writer
from actserve.store.artifact import Artifact, Manifest
from tests.recorded import Unlimited

NAME = "robot"
PERIOD_S = 0.04
BEGUN_S = 1_700_000_000.0
ROBOT = Signature(
    observations=(
        TensorSpec("observation_images_top", "uint8", (12, 16, 3)),
        TensorSpec("observation_images_wrist", "float32", (3, 10, 14), 0.0, 1.0),
        TensorSpec("observation_state", "float32", (5,)),
        TensorSpec("gripper", "int64", (), 0, 9),
    ),
    outputs=(TensorSpec("action", "float32", (1,), -1.0, 1.0), TensorSpec("value", "float32", ())),
    max_batch=8,
)


@dataclass(frozen=True)
class Recorded:
    """The steps of one episode: the inputs and outputs by name, each (1, *shape); their rewards."""

    steps: list[Arrays]
    rewards: list[float | None]


def record_episodes(
    folder: Path,
    signature: Signature = ROBOT,
    lengths: Sequence[int] = (4, 3),
    rewards: bool = True,
    environment: Contract | None = None,
    values: Mapping[str, Any] | None = None,
) -> list[Recorded]:
    """Record episodes of random values, side by side, `PERIOD_S` apart. The last one is cut: nobody says it is done.

    `values` are inputs or outputs that are the same in every step, each (*shape).
    """
    now_s = BEGUN_S
    recorder = Recorder(str(folder), Unlimited(1.0), 64 << 20, clock=lambda: now_s)
    manifest = Manifest(1, NAME, 1, None, "", signature, environment, {}, {}, {}, {})
    policy = recorder.of(Artifact(Path("nowhere"), manifest), "onnx")
    rng = np.random.default_rng(0)
    found = [Recorded([], []) for _ in lengths]
    with Writer(recorder, folder):
        episodes: list[Any] = [policy.episode("robot", None) for _ in lengths]
        for number in range(max(lengths)):
            for i, (episode, length) in enumerate(zip(episodes, lengths, strict=True)):
                if number >= length:
                    continue
                inputs = {spec.name: spec.sample(rng, 1) for spec in signature.inputs}
                if signature.is_init:
                    inputs[IS_INIT.name] = np.array([number == 0])
                outputs = {spec.name: spec.sample(rng, 1) for spec in signature.results}
                for name, value in (values or {}).items():
                    target = inputs if name in inputs else outputs
                    target[name] = np.array(value, target[name].dtype)[None]
                step = episode.step(number + 1)
                step.capture(inputs, outputs, slice(0, 1), 1000)
                step.commit()
                reward = float(number) if rewards else None
                if rewards:
                    episode.tell(Feedback(reward, number == length - 1 and i < len(lengths) - 1))
                found[i].steps.append(inputs | outputs)
                found[i].rewards.append(reward)
            now_s += PERIOD_S
        for episode in episodes:
            episode.end()
    assert recorder.stopped is None
    return found
