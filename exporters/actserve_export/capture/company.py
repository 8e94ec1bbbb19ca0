"""Does an item's result depend on anything but its own inputs: on the other items of its batch, or on hidden draws?

`x / x.abs().max()`, `q - q.mean()` and batch statistics do. Such a policy is exported one item at a time: served in
batches, one client's observation would change another client's action.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Arrays, Signature
from actserve.engine import golden
from actserve.engine.golden import Tolerance
from actserve_export.programs.cost import Run, cpu_seconds, first

FAR = 1e6  # an end of a range without bounds
ITEMS, FEWEST_ITEMS = 32, 8  # that are compared
BUDGET_S = 2.0  # for all comparisons
COMPANIES = 3  # each item is run in so many batches, beside other items and at another place


def affordable(run: Run, inputs: Arrays, runs: int = 2 + 1 + COMPANIES + 2) -> int:
    """How many items `run` can take `runs` times in `BUDGET_S`. `inputs`: every input, each (n, *shape)."""
    return int(BUDGET_S / runs / cpu_seconds(run, first(inputs, 1)))


def refuse_hidden_draws(run: Run, inputs: Arrays) -> None:
    """Raise `CaptureFailed` if the same inputs, noise included, give other results the second time."""
    before = _generators()
    first, second = run(inputs), run(inputs)
    changed = [
        name for name in first if not np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f")
    ]
    if drew := [name for name, state in _generators().items() if state != before[name]]:
        raise CaptureFailed(
            f"the policy draws random numbers from {' and '.join(drew)}, and a program cannot: draw with torch instead"
        )
    if drawing := _draws_of_torch(partial(run, inputs)):
        raise CaptureFailed(
            f"the policy draws with torch's {' and '.join(sorted(drawing))}, which cannot be made an input of the "
            "program: draw with torch.rand or torch.randn, or turn it off when the policy acts"
        )
    if changed:
        raise CaptureFailed(
            f"the same inputs give another {', '.join(changed)} each time: the policy draws random numbers outside of "
            "torch, or reads what changes outside of its modules (a global variable, a closure, a clock); draw with "
            'torch, and declare state as a key that the policy reads and writes as ("next", key)'
        )


def _draws_of_torch(run: Callable[[], Any]) -> set[str]:
    """The operators of torch that change its random number generator in a run."""
    before = torch.get_rng_state()
    with _Operators() as operators:
        run()
    return operators.seeded if not torch.equal(torch.get_rng_state(), before) else set()


class _Operators(TorchDispatchMode):
    """Collects the names of operators that can draw."""

    def __init__(self) -> None:
        super().__init__()
        self.seeded: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seeded.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def _generators() -> dict[str, str]:
    """The state of the random number generators of Python and numpy."""
    return {"Python's random": repr(random.getstate()), "numpy.random": repr(np.random.get_state(legacy=False))}


def dependence(run: Run, signature: Signature, inputs: Arrays) -> str | None:
    """The reason why items cannot share a batch, or None.

    `run` is the policy itself. `inputs`: every input, each (n, *shape). Each item is run alone, with all others in
    several random orders, and beside observations at both ends of their range.
    """
    alone = golden.in_batches(run, inputs, 1)
    rng = np.random.default_rng(1)
    count = len(alone[signature.action.name])
    for _ in range(COMPANIES):
        order = rng.permutation(count)
        together = golden.in_batches(run, {name: array[order] for name, array in inputs.items()}, count)
        if reason := _difference(signature, together, {k: v[order] for k, v in alone.items()}):
            return reason
    try:
        twice = {name: np.concatenate([array, array]) for name, array in inputs.items()}
        beside = run(twice | _extremes(signature, inputs))
    except CaptureFailed:  # it refuses such observations
        return None
    return _difference(signature, {name: array[:count] for name, array in beside.items()}, alone)


def _extremes(signature: Signature, inputs: Arrays) -> Arrays:
    """The observations, each (2n, *shape): as they are, and then at the ends of their range, high and low in turn."""
    found = {}
    for spec in signature.observations:
        own = inputs[spec.name]
        least, most = (0.0, 1.0) if own.dtype == bool else map(float, spec.limits)
        low, high = np.clip(spec.each_low, max(least, -FAR), None), np.clip(spec.each_high, None, min(most, FAR))
        ends = np.where(np.arange(len(own)).reshape(-1, *[1] * len(spec.shape)) % 2, low, high)
        found[spec.name] = np.concatenate([own, np.broadcast_to(ends, own.shape).astype(own.dtype)])
    return found


def _difference(signature: Signature, ours: Arrays, alone: Arrays) -> str | None:
    agreement = golden.compare(signature, ours, alone, Tolerance())
    if agreement.holds:
        return None
    outputs = ", ".join(agreement.exceeding) or signature.action.name
    return (
        f"an item's result depends on the other items of its batch: {len(agreement.differing)} of "
        f"{agreement.compared} actions differ from the same observation alone ({outputs})"
    )
