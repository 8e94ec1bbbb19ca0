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
) -> tuple[dict[str, Any], dict[int, Arrays]]:
    """How often the actions of a narrower program equal the original program's, JSON-able; and the narrower program's
    results by batch size, each (N, *shape).

    `held_out` holds every input by name, each (N, *shape), without items that the program was calibrated on. `play`
    plays the same games with each program and returns their scores; without it, there are no scores.
    Raises `Disagreement` if less than the share `required` of the actions is equal, at any batch size.
    """
    action, theirs = signature.action.name, golden.in_batches(original, held_out, min(SIZES[-1], signature.max_batch))
    sizes = sorted({min(size, signature.max_batch) for size in SIZES})
    results = {size: golden.in_batches(run, held_out, size) for size in sizes}
    same = {size: agreeing(ours[action], theirs[action], NEAR) for size, ours in results.items()}
    size = min(same, key=lambda each: float(np.mean(same[each])))
    share = float(np.mean(same[size]))
    compared = golden.compare(signature, results[size], theirs, Tolerance())
    evidence: dict[str, Any] = {
        "samples": compared.compared,
        "batch_sizes": list(results),
        "agreement": share,
        "required": required,
        "largest_difference": compared.largest_difference,
        # Other batch sizes sum in another order, and the sums are rounded.
        "actions_that_depend_on_the_batch": int(np.sum(~_steady(signature, results))),
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
    return evidence, results


def golden_items(signature: Signature, results: Mapping[int, Arrays], count: int) -> tuple[Array, Tolerance]:
    """Up to `count` items, (n,), whose actions are the same at every batch size, and a tolerance for their outputs.

    A host repeats them when it loads the program, alone and in batches. `results` are those of `certify_narrow`. Raises
    `Disagreement` if there are none.
    """
    items = np.flatnonzero(_steady(signature, results))
    if not len(items):
        raise Disagreement("every action of the narrower program depends on the size of its batch")
    chosen = items[np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]
    spread = 0.0
    for spec in signature.results:
        if spec.numpy_dtype.kind == "f":
            each = np.stack([ours[spec.name].astype(np.float64) for ours in results.values()])
            spread = max(spread, float(np.max(each.max(0) - each.min(0), initial=0.0)))
    default = Tolerance()
    return chosen, Tolerance(max(default.absolute, 2 * spread), default.relative)


def _steady(signature: Signature, results: Mapping[int, Arrays]) -> Array:
    """(N,) bool: whether each item's action is the same at every batch size."""
    actions = [ours[signature.action.name] for ours in results.values()]
    steady: Array = np.logical_and.reduce([agreeing(each, actions[0], NEAR) for each in actions])
    return steady
