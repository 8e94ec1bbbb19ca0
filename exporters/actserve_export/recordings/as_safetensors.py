"""A recording as safetensors: one file for each trajectory, with a row for each step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from actserve.core.signature import Arrays
from actserve.recording.reader import Steps
from actserve.recording.rows import OBSERVATION, OUTPUT
from actserve_export.recordings.trajectories import Trajectory, make_new, trajectories


def write(steps: Steps, out: Path, progress: Callable[[int], None]) -> int:
    """Write `000000.safetensors` and so on into the folder `out` -> the number of files.

    A file has the observations (`observation.NAME`) and outputs (`output.NAME`), each (T, *shape), and `step`,
    `time_us`, `reward` (NaN: not known) and `done`. `progress` gets numbers of steps. Raises `UsageError` if the folder
    has files.
    """
    make_new(out)
    count = 0
    for trajectory in trajectories(steps, progress):
        first = trajectory.steps[0]
        save_file(_stacked(trajectory), out / f"{count:06}.safetensors", {"episode": first.episode, "door": first.door})
        count += 1
    return count


def _stacked(trajectory: Trajectory) -> Arrays:
    steps = trajectory.steps
    names = [name for name in steps[0].tensors if name.startswith((OBSERVATION, OUTPUT))]
    tensors = {name: np.stack([step.tensors[name] for step in steps]) for name in names}
    tensors["step"] = np.array([step.step for step in steps])
    tensors["time_us"] = np.array([int(step.time.timestamp() * 1e6) for step in steps])
    return tensors | {"reward": trajectory.reward, "done": trajectory.done}
