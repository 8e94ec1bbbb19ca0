"""A recording as a dataset of LeRobot: one episode for each trajectory, one frame for each step.

Images are images, and the rest is float32, as LeRobot's policies read it: `observation.images.NAME`,
`observation.state`, `action`; `next.reward` and `next.done` if the clients told rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actserve.core.errors import UsageError
from actserve.core.robot import Robot
from actserve.core.signature import Array, Signature, TensorSpec
from actserve.recording.images import as_image, image_shape, is_image
from actserve.recording.rate import contract_of, steps_per_second
from actserve.recording.reader import Step, Steps
from actserve.recording.rows import OBSERVATION, OUTPUT
from actserve_export.recordings.trajectories import Trajectory, check_new, trajectories

REWARD, DONE = "next.reward", "next.done"
_GIVEN = ("state", "environment_state")  # names that LeRobot's policies look for


def write(steps: Steps, out: Path, progress: Callable[[int], None]) -> int:
    """Write the dataset into the folder `out` -> the number of episodes. `progress` gets numbers of steps.

    Trajectories of one step, such as stateless requests, are left out. Raises `UsageError` if the folder has files, if
    there is no other trajectory, or if the policy plans chunks.
    """
    check_new(out)
    signature = steps.signature
    if signature.chunk is not None:
        raise UsageError(
            "expected a policy with one action for each step, as LeRobot's frames have; this one plans chunks, and is "
            "recorded when it runs"
        )
    transitions = steps.transitions()
    rate = steps_per_second(steps, transitions)
    if transitions.is_last.all() or rate is None:
        raise UsageError("expected steps that follow one another; the recording has none, as it has requests alone")
    contract = contract_of(steps)
    joints = contract.joints if isinstance(contract, Robot) else ()
    frames = Frames(signature, joints, rewards=not bool(np.isnan(transitions.reward).all()))
    name = steps.newest.policy
    dataset_class = _dataset_class()
    if out.exists():
        out.rmdir()  # LeRobot makes it
    dataset = dataset_class.create(
        f"actserve/{name}", round(max(1.0, rate)), frames.features, root=out, use_videos=False
    )
    count = 0
    for trajectory in trajectories(steps, progress):
        if len(trajectory.steps) == 1:
            continue
        for frame in frames.of(trajectory):
            dataset.add_frame(frame | {"task": name})
            for number in frames.numbers:  # of shape (1,): as LeRobot's own, a scalar in its buffer
                dataset.episode_buffer[number][-1] = dataset.episode_buffer[number][-1][0]
        dataset.save_episode()
        count += 1
    dataset.finalize()
    return count


def _dataset_class() -> Any:
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ModuleNotFoundError as error:
        raise UsageError(
            f'this needs LeRobot ({error.name} is missing), which needs an older PyTorch: install "actserve[record]" '
            "in LeRobot's own environment, and run the command there"
        ) from error
    return LeRobotDataset


@dataclass(frozen=True)
class _Feature:
    """A tensor of the recording as a feature of the dataset."""

    name: str
    column: str
    spec: TensorSpec

    @property
    def is_image(self) -> bool:
        return self.column.startswith(OBSERVATION) and is_image(self.spec)

    def describe(self, names: tuple[str, ...]) -> dict[str, Any]:
        if self.is_image:
            return {"dtype": "image", "shape": image_shape(self.spec), "names": ["height", "width", "channels"]}
        size = max(1, self.spec.elements)
        return {"dtype": "float32", "shape": (size,), "names": list(names) if len(names) == size else None}

    def value(self, step: Step) -> Array:
        """(H, W, 3) uint8 of an image, else (n,) float32."""
        array = step.tensors[self.column]
        return as_image(array, self.spec) if self.is_image else array.reshape(-1).astype(np.float32)


class Frames:
    """The frames of a dataset. `joints` are the names of the action's elements, if they are known."""

    def __init__(self, signature: Signature, joints: tuple[str, ...], rewards: bool) -> None:
        names = _names(signature.observations)
        self._features = [
            *(_Feature(names[spec.name], OBSERVATION + spec.name, spec) for spec in signature.observations),
            _Feature("action", OUTPUT + signature.action.name, signature.action),
        ]
        self._rewards = rewards
        self.features = {f.name: f.describe(joints if f.name == "action" else ()) for f in self._features}
        if rewards:
            self.features[REWARD] = {"dtype": "float32", "shape": (1,), "names": None}
            self.features[DONE] = {"dtype": "bool", "shape": (1,), "names": None}
        self.numbers = [name for name, feature in self.features.items() if feature["shape"] == (1,)]

    def of(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        """The frames of a trajectory, by feature. A reward that is not known is 0."""
        rewards = np.nan_to_num(trajectory.reward).astype(np.float32)[:, None]
        for step, reward, done in zip(trajectory.steps, rewards, trajectory.done[:, None], strict=True):
            frame = {feature.name: feature.value(step) for feature in self._features}
            yield frame | ({REWARD: reward, DONE: done} if self._rewards else {})


def _names(observations: Sequence[TensorSpec]) -> dict[str, str]:
    """The feature of each observation. A single vector is the state, which is where LeRobot's policies look for it."""
    found = {}
    for spec in observations:
        short = spec.name.removeprefix("observation").lstrip("_./").replace("/", "_") or spec.name
        if is_image(spec):
            short = f"images.{short.removeprefix('images').lstrip('_.') or short}"
        elif short not in _GIVEN and sum(not is_image(other) for other in observations) == 1:
            short = "state"
        found[spec.name] = f"observation.{short}"
    if len(set(found.values())) < len(found):  # observation_x and x
        return {name: f"observation.{name.replace('/', '_')}" for name in found}
    return found
