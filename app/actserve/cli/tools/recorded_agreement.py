"""Compares the actions of two programs on a recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from actserve.cli.tools.diff import ActionAgreement
from actserve.core.signature import Arrays
from actserve.engine.golden import Tolerance, agreeing
from actserve.engine.runtimes.base import Runtime
from actserve.recording.reader import Step, Steps
from actserve.recording.replay import Player, ProgramActor

WINDOW_BYTES = 64 << 20  # of steps that are read at once


def agreement(steps: Steps, before: Runtime, after: Runtime, progress: Callable[[int], None]) -> ActionAgreement:
    """Play `steps` on both programs, each with its own state, and compare what both could play.

    Raises `UsageError` if a program takes other observations than the recorded ones.
    """
    players = [Player(ProgramActor(runtime.signature, runtime.run), steps.signature) for runtime in (before, after)]
    action = before.signature.action
    samples = same = 0
    largest: dict[str, float] = {}
    for window in steps.windows(WINDOW_BYTES):
        ours, theirs = (_played(player, window) for player in players)
        both = [number for number in range(len(window)) if number in ours[0] and number in theirs[0]]
        a, b = ({k: v[[rows[n] for n in both]] for k, v in outputs.items()} for rows, outputs in (ours, theirs))
        if both:
            samples += len(both)
            same += int(agreeing(a[action.name], b[action.name], Tolerance().of(action)).sum())
            for name in a.keys() & b.keys():
                if a[name].dtype.kind == "f" and a[name].shape == b[name].shape:
                    difference = float(np.max(np.abs(a[name] - b[name]), initial=0.0))
                    largest[name] = max(largest.get(name, 0.0), difference)
        progress(len(window))
    return ActionAgreement(samples, same, dict(sorted(largest.items())), "recorded steps")


def _played(player: Player, window: Sequence[Step]) -> tuple[dict[int, int], Arrays]:
    """The row of each step that could be played, by its number in `window`; the outputs of all rows."""
    numbers = {id(step): number for number, step in enumerate(window)}
    rows: dict[int, int] = {}
    parts: list[Arrays] = []
    for batch, outputs in player.play(window):
        for step in batch:
            rows[numbers[id(step)]] = len(rows)
        parts.append(outputs)
    return rows, {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else {})}
