"""A recording as a TensorDict of transitions, in memory-mapped files.

`TensorDict.load_memmap` opens it, and `torchrl.data.ReplayBuffer` takes it. It has the observations and outputs by
name, `("next", observation)`, `("next", "reward")`, `("next", "done")`, `("next", "terminated")`, `is_init`, and
`("collector", "traj_ids")` for samplers of trajectories.

The last step of a trajectory has no next observation. If it is done, its own observation stands there, which no
algorithm reads. If it is not, it is left out: nobody knows what came after it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from actserve.core.errors import UsageError
from actserve.core.signature import Array, TensorSpec
from actserve.recording.reader import Step, Steps
from actserve.recording.rows import OBSERVATION, OUTPUT

WINDOW_BYTES = 64 << 20  # of steps that are in memory at once


def write(steps: Steps, out: Path, progress: Callable[[int], None]) -> int:
    """Write the transitions into the folder `out` -> how many there are. `progress` gets numbers of steps.

    Raises `UsageError` if the folder has something, or if no two steps follow one another.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"expected a new or empty folder; {out} has files")
    transitions, signature = steps.transitions(), steps.signature
    kept = ~transitions.is_last | transitions.done
    count = int(kept.sum())
    if not count:
        raise UsageError("expected steps that follow one another; the recording has none, as it has requests alone")
    placed = np.cumsum(kept) - 1  # of each step in order, its transition
    place_of_row = np.empty(len(kept), np.int64)
    place_of_row[transitions.row] = np.arange(len(kept))
    observations = {spec.name: _tensor(spec) for spec in signature.observations}
    outputs = {spec.name: _tensor(spec) for spec in signature.outputs}
    one = torch.zeros(1)
    flag = torch.zeros(1, dtype=torch.bool)
    following = {**observations, "reward": one, "done": flag, "terminated": flag}
    collector = {"traj_ids": torch.zeros((), dtype=torch.int64)}
    item = {**observations, **outputs, "is_init": flag, "done": flag, "terminated": flag, "step": collector["traj_ids"]}
    data = TensorDict({**item, "next": following, "collector": collector}).expand(count).memmap_like(out)
    data["collector", "traj_ids"].copy_(torch.from_numpy(transitions.trajectory[kept]))
    data["step"].copy_(torch.from_numpy(transitions.step[kept]))
    data["next", "reward"].copy_(torch.from_numpy(np.nan_to_num(transitions.reward[kept])[:, None]))
    for name in ("done", "terminated"):
        data["next", name].copy_(torch.from_numpy(transitions.done[kept][:, None]))
    starts = np.append(True, transitions.trajectory[1:] != transitions.trajectory[:-1])
    data["is_init"].copy_(torch.from_numpy(starts[kept][:, None]))
    row = 0
    for window in steps.windows(WINDOW_BYTES):
        for step in window:
            place = place_of_row[row]
            _place(data, step, int(placed[place]) if kept[place] else None, names=(observations, outputs))
            before = int(placed[place - 1])
            if place and not transitions.is_last[place - 1]:
                _next(data, step, before, observations)
            if transitions.is_last[place] and transitions.done[place]:
                _next(data, step, int(placed[place]), observations)
            row += 1
        progress(len(window))
    return count


def _tensor(spec: TensorSpec) -> Any:
    return torch.from_numpy(spec.zeros(1)[0].copy() if spec.shape else np.array(0, spec.numpy_dtype))


def _place(data: Any, step: Step, place: int | None, names: tuple[dict[str, Any], dict[str, Any]]) -> None:
    if place is None:
        return
    for prefix, found in zip((OBSERVATION, OUTPUT), names, strict=True):
        for name in found:
            data[name][place] = _as_torch(step.tensors[prefix + name])


def _next(data: Any, step: Step, place: int, observations: dict[str, Any]) -> None:
    for name in observations:
        data["next", name][place] = _as_torch(step.tensors[OBSERVATION + name])


def _as_torch(array: Array) -> Any:
    return torch.from_numpy(np.array(array))
