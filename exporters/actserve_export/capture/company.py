"""Does an item's result depend on anything but its own inputs: on the other items of its batch, or on hidden draws?

`x / x.abs().max()`, `q - q.mean()` and batch statistics do. Such a policy is exported one item at a time: served in
batches, one client's observation would change another client's action.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Arrays, Signature
from actserve.engine import golden
from actserve.engine.golden import Tolerance

ITEMS = 32  # that are compared
COMPANIES = 3  # each item is run in so many batches, beside other items and at another place
Run = Callable[[Arrays], Arrays]


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
    if changed:
        raise CaptureFailed(
            f"the same inputs give another {', '.join(changed)} each time: the policy draws random numbers outside of "
            "torch (numpy.random, random), or reads something that changes; draw with torch instead"
        )


def _generators() -> dict[str, str]:
    """The state of the random number generators of Python and numpy."""
    return {"Python's random": repr(random.getstate()), "numpy.random": repr(np.random.get_state(legacy=False))}


def dependence(run: Run, signature: Signature, inputs: Arrays) -> str | None:
    """The reason why items cannot share a batch, or None.

    `run` is the policy itself. `inputs`: every input, each (n, *shape). Each item is run alone, and with all
    others in several random orders.
    """
    alone = golden.in_batches(run, inputs, 1)
    rng = np.random.default_rng(1)
    for _ in range(COMPANIES):
        order = rng.permutation(len(alone[signature.action.name]))
        together = golden.in_batches(run, {name: array[order] for name, array in inputs.items()}, len(order))
        agreement = golden.compare(signature, together, {k: v[order] for k, v in alone.items()}, Tolerance())
        if not agreement.holds:
            outputs = ", ".join(agreement.exceeding) or signature.action.name
            return (
                f"an item's result depends on the other items of its batch: {len(agreement.differing)} of "
                f"{agreement.compared} actions differ from the same observation alone ({outputs})"
            )
    return None
