"""The trajectories of a recording: steps that follow one another, with what the client told about each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actserve.core.errors import UsageError
from actserve.core.signature import Array
from actserve.recording.reader import Step, Steps

WINDOW_BYTES = 64 << 20  # of steps that are read at once


def check_new(folder: Path) -> None:
    """Raise `UsageError` if there is a folder with files."""
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"expected a new or empty folder; {folder} has files")


def make_new(folder: Path) -> None:
    """Make the folder. Raises `UsageError` if it has files."""
    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Trajectory:
    """The steps in order; the reward of each, (T,) float64, NaN if it is not known; whether it is done, (T,) bool."""

    steps: list[Step]
    reward: Array
    done: Array


def trajectories(steps: Steps, progress: Callable[[int], None]) -> Iterator[Trajectory]:
    """Each trajectory once its last step was read. `progress` gets numbers of steps.

    Trajectories that were recorded side by side are in memory at the same time.
    """
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
            row += 1
            if not left[number]:
                found = begun.pop(number)
                places = sorted(found)
                taken = [found[each] for each in places]
                yield Trajectory(taken, transitions.reward[places], transitions.done[places])
        progress(len(window))
