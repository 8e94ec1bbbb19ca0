"""How much a certificate compares: as many samples and steps as fit into a budget of time, within limits.

A slow policy gets fewer of them. It gets every kind of comparison: each item alone and in other company at each batch
size, every program, and rollouts of several episodes with resets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actserve.core.signature import Arrays, Signature

BATCH_SIZES = (1, 3, 8, 32)
LEAST_SAMPLES, MOST_SAMPLES = 64, 512
LEAST_DRAWS, MOST_DRAWS = 256, 4096  # of the test of random actions
LEAST_STEPS, MOST_STEPS = 100, 200  # of a rollout
FEW_ROWS, ROWS = 2, 8  # episodes side by side in a rollout
BUDGET_S = 1.5  # of one core, for the samples, and again for the rollout
SLOW_S = 0.005  # one item: the programs are compared on several cores
_WORTH_SAYING_S = 3.0
_IN_BATCH = 8
_CALLS, _LONG_S = 5, 0.05  # when measuring

Run = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Effort:
    """`samples_s` and `rollout_s` are the expected seconds. `slow`: a call is long enough to share the cores."""

    samples: int
    samples_s: float
    steps: int
    rows: int
    rollout_s: float
    draws: int
    slow: bool

    @staticmethod
    def of(reference: Run, programs: Sequence[Run], signature: Signature, inputs: Arrays) -> Effort:
        """Measure how long the policy and its programs take on a few of `inputs`, each (n, *shape)."""
        alone = _first(inputs, 1)
        reference_s = _seconds(reference, alone)
        programs_s = [_seconds(run, alone) for run in programs]
        slow = reference_s > SLOW_S
        sizes = len([size for size in BATCH_SIZES if size <= signature.max_batch])
        sample_s = reference_s + sizes * sum(programs_s)
        samples = int(_within(LEAST_SAMPLES, BUDGET_S / sample_s, MOST_SAMPLES)) // 32 * 32
        share = max(reference_s + sizes * sum(programs_s[1:]), sizes * programs_s[0]) if slow else sample_s
        rows = min(ROWS, signature.max_batch)
        step_s = 0.0
        if signature.state:
            step_s = _step_seconds(reference, programs, inputs, rows)
            if MOST_STEPS * step_s > BUDGET_S and rows > FEW_ROWS:
                rows = FEW_ROWS
                step_s = _step_seconds(reference, programs, inputs, rows)
        steps = int(_within(LEAST_STEPS, BUDGET_S / max(step_s, 1e-9), MOST_STEPS))
        item_s = _seconds(reference, _first(inputs, _IN_BATCH)) / _IN_BATCH
        draws = int(_within(LEAST_DRAWS, BUDGET_S / item_s / 2, MOST_DRAWS))  # twice: from noise, and as in training
        return Effort(samples, samples * share, steps, rows, steps * step_s, draws, slow)


def about(seconds: float) -> str:
    """The end of a line about a step that takes so long."""
    return f", about {seconds:.0f} s" if seconds >= _WORTH_SAYING_S else ""


def _step_seconds(reference: Run, programs: Sequence[Run], inputs: Arrays, rows: int) -> float:
    return sum(_seconds(run, _first(inputs, rows)) for run in (reference, *programs))


def _first(inputs: Arrays, count: int) -> Arrays:
    return {name: array[:count] for name, array in inputs.items()}


def _seconds(run: Run, inputs: Arrays) -> float:
    """CPU seconds of a call: the fastest of several after the first, which may prepare something."""
    run(inputs)
    calls_s: list[float] = []
    while not calls_s or (len(calls_s) < _CALLS and sum(calls_s) < _LONG_S):
        begun_s = time.process_time()
        run(inputs)
        calls_s.append(max(time.process_time() - begun_s, 1e-6))
    return min(calls_s)


def _within(least: float, value: float, most: float) -> float:
    return max(least, min(value, most))
