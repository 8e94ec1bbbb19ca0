"""How much a certificate compares: as many samples and steps as fit into a budget of time, within limits.

A slow policy gets fewer of them. It gets every kind of comparison: each item alone and in other company at each batch
size, every program, and rollouts of several episodes with resets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actserve.core.signature import Arrays, Signature
from actserve_export.programs.cost import Run, cpu_seconds, first

BATCH_SIZES = (1, 3, 8, 32)
LEAST_SAMPLES, MOST_SAMPLES = 64, 512
LEAST_DRAWS, MOST_DRAWS = 256, 4096  # of the test of random actions
LEAST_STEPS, MOST_STEPS = 100, 200  # of a rollout
FEW_ROWS, ROWS = 2, 8  # episodes side by side in a rollout
BUDGET_S = 1.5  # of one core, for the samples, and again for the rollout
SLOW_S = 0.005  # one item: the programs are compared on several cores
_WORTH_SAYING_S = 3.0
_IN_BATCH = 8


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
        alone = first(inputs, 1)
        reference_s = cpu_seconds(reference, alone)
        programs_s = [cpu_seconds(run, alone) for run in programs]
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
        item_s = cpu_seconds(reference, first(inputs, _IN_BATCH)) / _IN_BATCH
        draws = int(_within(LEAST_DRAWS, BUDGET_S / item_s / 2, MOST_DRAWS))  # twice: from noise, and as in training
        return Effort(samples, samples * share, steps, rows, steps * step_s, draws, slow)


def about(seconds: float) -> str:
    """The end of a line about a step that takes so long."""
    return f", about {seconds:.0f} s" if seconds >= _WORTH_SAYING_S else ""


def _step_seconds(reference: Run, programs: Sequence[Run], inputs: Arrays, rows: int) -> float:
    return sum(cpu_seconds(run, first(inputs, rows)) for run in (reference, *programs))


def _within(least: float, value: float, most: float) -> float:
    return max(least, min(value, most))
