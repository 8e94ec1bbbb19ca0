"""A recording as a TensorDict of transitions, in memory-mapped files.

`TensorDict.load_memmap` opens it, and `torchrl.data.ReplayBuffer` takes it. It has the observations and outputs by
name, `("next", observation)`, `("next", "reward")`, `("next", "done")`, `("next", "terminated")`, `is_init`, and
`("collector", "traj_ids")` for samplers of trajectories.

The last step of a trajectory has no next observation. If it is done, its own observation takes that place, and no
algorithm reads it. If it is not done, the step is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from actserve.core.errors import UsageError
from actserve.core.signature import Array, Signature, TensorSpec
from actserve.recording.reader import Step, Steps, Transitions
from actserve.recording.rows import OBSERVATION, OUTPUT
from actserve_export.recordings.trajectories import check_new

WINDOW_BYTES = 64 << 20  # of steps that are in memory at once


def write(steps: Steps, out: Path, progress: Callable[[int], None]) -> int:
    """Write the transitions into the folder `out` -> how many there are. `progress` gets numbers of steps.

    Raises `UsageError` if the folder has something, or if no two steps follow one another.
    """
    check_new(out)
    transitions, signature = steps.transitions(), steps.signature
    kept = ~transitions.is_last | transitions.done
    count = int(kept.sum())
    if not count:
        raise UsageError("expected steps that follow one another; the recording has none, as it has requests alone")
    data = _empty(signature, count, out)
    _write_facts(data, transitions, kept)
    order = np.empty(len(kept), np.int64)  # of each step as it is read, its place in `transitions`
    order[transitions.row] = np.arange(len(kept))
    transition = np.cumsum(kept) - 1  # of each place
    read = 0
    for window in steps.windows(WINDOW_BYTES):
        for step, place in zip(window, order[read:], strict=False):
            if kept[place]:
                _write(data, step, OBSERVATION, signature.observations, int(transition[place]))
                _write(data, step, OUTPUT, signature.outputs, int(transition[place]))
            if place and not transitions.is_last[place - 1]:
                _write(data["next"], step, OBSERVATION, signature.observations, int(transition[place - 1]))
            if kept[place] and transitions.is_last[place]:
                _write(data["next"], step, OBSERVATION, signature.observations, int(transition[place]))
        read += len(window)
        progress(len(window))
    return count


def _empty(signature: Signature, count: int, out: Path) -> Any:
    """A TensorDict of `count` transitions of zeros, in files in `out`."""
    observations = {spec.name: _zeros(spec) for spec in signature.observations}
    outputs = {spec.name: _zeros(spec) for spec in signature.outputs}
    flag, number = torch.zeros(1, dtype=torch.bool), torch.zeros((), dtype=torch.int64)
    ends = {"done": flag, "terminated": flag}
    following = {**observations, **ends, "reward": torch.zeros(1)}
    item = {**observations, **outputs, **ends, "is_init": flag, "step": number}
    whole = TensorDict({**item, "next": following, "collector": {"traj_ids": number}})
    return whole.expand(count).memmap_like(out)


def _write_facts(data: Any, transitions: Transitions, kept: Array) -> None:
    """Write all that is not in the steps themselves. `kept` are the steps that are transitions, (N,) bool."""
    starts = np.append(True, transitions.trajectory[1:] != transitions.trajectory[:-1])
    data["collector", "traj_ids"].copy_(torch.from_numpy(transitions.trajectory[kept]))
    data["step"].copy_(torch.from_numpy(transitions.step[kept]))
    data["is_init"].copy_(torch.from_numpy(starts[kept][:, None]))
    data["next", "reward"].copy_(torch.from_numpy(np.nan_to_num(transitions.reward[kept])[:, None]))
    for name in ("done", "terminated"):
        data["next", name].copy_(torch.from_numpy(transitions.done[kept][:, None]))


def _zeros(spec: TensorSpec) -> Any:
    """One item, (*shape)."""
    return torch.from_numpy(spec.zeros(1))[0]


def _write(data: Any, step: Step, prefix: str, specs: Sequence[TensorSpec], place: int) -> None:
    """Write the step's tensors of `specs` to transition `place`."""
    for spec in specs:
        data[spec.name][place] = torch.from_numpy(np.array(step.tensors[prefix + spec.name]))
