"""A recording as safetensors: one file for each trajectory, with a row for each step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from actserve.core.errors import UsageError
from actserve.core.signature import Arrays
from actserve.recording.reader import Step, Steps
from actserve.recording.rows import OBSERVATION, OUTPUT

WINDOW_BYTES = 64 << 20  # of steps that are read at once


def write(steps: Steps, out: Path, progress: Callable[[int], None]) -> int:
    """Write `000000.safetensors` and so on into the folder `out` -> the number of files. `progress` as in `torchrl`.

    A file has the observations (`observation.NAME`) and outputs (`output.NAME`), each (T, *shape), and `step`,
    `time_us`, `reward` (NaN: not known) and `done`. Raises `UsageError` if the folder has something.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"expected a new or empty folder; {out} has files")
    out.mkdir(parents=True, exist_ok=True)
    transitions = steps.transitions()
    place_of_row = np.empty(len(transitions.row), np.int64)
    place_of_row[transitions.row] = np.arange(len(transitions.row))
    left = np.bincount(transitions.trajectory)
    begun: dict[int, dict[int, Step]] = {}  # by trajectory and place
    row = 0
    for window in steps.windows(WINDOW_BYTES):
        for step in window:
            place = int(place_of_row[row])
            number = int(transitions.trajectory[place])
            begun.setdefault(number, {})[place] = step
            left[number] -= 1
            if not left[number]:
                found = begun.pop(number)
                places = sorted(found)
                tensors = _stacked([found[each] for each in places])
                tensors |= {"reward": transitions.reward[places], "done": transitions.done[places]}
                save_file(tensors, out / f"{number:06}.safetensors", {"episode": step.episode, "door": step.door})
            row += 1
        progress(len(window))
    return len(left)


def _stacked(steps: list[Step]) -> Arrays:
    names = [name for name in steps[0].tensors if name.startswith((OBSERVATION, OUTPUT))]
    tensors = {name: np.stack([step.tensors[name] for step in steps]) for name in names}
    tensors["step"] = np.array([step.step for step in steps])
    tensors["time_us"] = np.array([int(step.time.timestamp() * 1e6) for step in steps])
    return tensors
