"""The certificate of a program in int8 or bf16, which cannot give the same results as the original in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from actserve.core.errors import Disagreement
from actserve.core.signature import Array, Arrays, Signature
from actserve.engine import golden
from actserve.engine.golden import Tolerance, agreeing
from actserve_export.certify.certify import score_margins
from actserve_export.programs.quantize.quantize import NEAR

SIZES = (1, 8, 32)  # items a call, up to what the program takes

Run = Callable[[Arrays], Arrays]


def certify_narrow(
    precision: str,
    signature: Signature,
    run: Run,
    original: Run,
    held_out: Mapping[str, Array],
    required: float,
    play: Callable[[Run], Sequence[float]] | None = None,
) -> dict[str, Any]:
    """How often the actions of a narrower program equal the original program's, JSON-able.

    `held_out` holds every input by name, each (N, *shape), without items that the program was calibrated on. `play`
    plays the same games with each program and returns their scores; without it, there are no scores.
    Raises `Disagreement` if less than the share `required` of the actions is equal, at any batch size.
    """
    action, theirs = signature.action.name, golden.in_batches(original, held_out, min(SIZES[-1], signature.max_batch))
    results = _in_each_size(signature, run, held_out)
    same = {size: agreeing(ours[action], theirs[action], NEAR) for size, ours in results.items()}
    size = min(same, key=lambda each: float(np.mean(same[each])))
    share = float(np.mean(same[size]))
    compared = golden.compare(signature, results[size], theirs, Tolerance())
    first = next(iter(results.values()))[action]
    evidence: dict[str, Any] = {
        "samples": compared.compared,
        "batch_sizes": list(results),
        "agreement": share,
        "required": required,
        "largest_difference": compared.largest_difference,
        # Other batch sizes sum in another order, and the sums are rounded.
        "actions_that_depend_on_the_batch": int(
            np.sum(np.logical_or.reduce([~agreeing(ours[action], first, NEAR) for ours in results.values()]))
        ),
    }
    margins = score_margins(signature, theirs)
    if margins is not None and not same[size].all():
        evidence["largest_lead_of_a_changed_action"] = float(margins[~same[size]].max())
        evidence["median_lead"] = float(np.median(margins))
    if share < required:
        raise Disagreement(
            f"{precision}: {share:.2%} of the actions on {compared.compared} held-out samples are the original's; "
            f"{required:.1%} are needed",
            **evidence,
        )
    if play is not None:
        evidence["scores"] = {precision: list(play(run)), "original": list(play(original))}
    return evidence


def steady_samples(
    signature: Signature, run: Run, held_out: Mapping[str, Array], count: int
) -> tuple[Arrays, Tolerance]:
    """Up to `count` items whose discrete actions are the same at every batch size, and a tolerance for their outputs.

    A host repeats them when it loads the program, alone and in batches. Raises `Disagreement` if there are none.
    """
    action = signature.action.name
    results = list(_in_each_size(signature, run, held_out).values())
    steady = np.ones(len(results[0][action]), bool)
    if signature.action.numpy_dtype.kind != "f":
        steady &= np.logical_and.reduce([agreeing(ours[action], results[0][action], NEAR) for ours in results])
    items = np.flatnonzero(steady)
    if not len(items):
        raise Disagreement("every action of the narrower program depends on the size of its batch")
    chosen = items[np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]
    spread = 0.0
    for spec in signature.results:
        if spec.numpy_dtype.kind == "f":
            each = np.stack([ours[spec.name].astype(np.float64) for ours in results])
            spread = max(spread, float(np.max(each.max(0) - each.min(0), initial=0.0)))
    default = Tolerance()
    return {name: array[chosen] for name, array in held_out.items()}, Tolerance(
        max(default.absolute, 2 * spread), default.relative
    )


def _in_each_size(signature: Signature, run: Run, inputs: Mapping[str, Array]) -> dict[int, Arrays]:
    sizes = sorted({min(size, signature.max_batch) for size in SIZES})
    return {size: golden.in_batches(run, inputs, size) for size in sizes}
