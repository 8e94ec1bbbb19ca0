"""How long a policy or a program takes. It decides how much can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable

from actserve.core.signature import Arrays

_CALLS, _LONG_S = 5, 0.05  # calls after the first, at most so many or so long

Run = Callable[[Arrays], Arrays]


def cpu_seconds(run: Run, inputs: Arrays) -> float:
    """CPU seconds of a call: the fastest of several after the first, which may prepare something."""
    run(inputs)
    calls_s: list[float] = []
    while not calls_s or (len(calls_s) < _CALLS and sum(calls_s) < _LONG_S):
        begun_s = time.process_time()
        run(inputs)
        calls_s.append(max(time.process_time() - begun_s, 1e-6))
    return min(calls_s)


def first(inputs: Arrays, count: int) -> Arrays:
    """The first `count` items of each input."""
    return {name: array[:count] for name, array in inputs.items()}
