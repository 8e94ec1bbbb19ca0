"""Rollouts in the certificate, with policies that are a formula."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from actserve.core.errors import Disagreement
from actserve.core.signature import Arrays, Signature, State, TensorSpec
from actserve_export.certify.certify import FOLLOWED, _compare_steps, _run_steps

STEPS = 100
SIGNATURE = Signature(
    observations=(TensorSpec("x", "float32", ()),),
    outputs=(TensorSpec("action", "float32", ()),),
    max_batch=8,
    state=(State(TensorSpec("h", "float32", ()), "next_h"),),
)
GIVEN = [{"x": np.random.default_rng(step).uniform(-1, 1, 3).astype(np.float32)} for step in range(STEPS)]


def policy(growth: float, error: float, at: int | None = None) -> Callable[[Arrays], Arrays]:
    """h' = growth h + x, where |h| stays below 1; `error` is added to each result, or once at step `at`."""
    ran = []

    def run(inputs: Arrays) -> Arrays:
        ran.append(1)
        h = np.mod(growth * inputs["h"] + inputs["x"] + 1, 2) - 1
        h = (h + (error if at is None or len(ran) == at + 1 else 0)).astype(np.float32)
        return {"action": h.copy(), "next_h": h}

    return run


def compare(program: Callable[[Arrays], Arrays], original: Callable[[Arrays], Arrays]) -> dict[str, object]:
    ours, theirs = (_run_steps(run, SIGNATURE, GIVEN) for run in (program, original))
    return _compare_steps("onnx", program, SIGNATURE, GIVEN, ours, theirs)


def test_differences_that_add_up_are_told_from_another_policy() -> None:
    found = compare(policy(1.15, 1e-6), policy(1.15, 0.0))
    assert found["steps"] == STEPS
    assert FOLLOWED <= int(str(found["steps_until_rounding_adds_up"])) < STEPS
    assert "steps_until_rounding_adds_up" not in compare(policy(0.9, 1e-6), policy(0.9, 0.0))


def test_a_step_that_is_not_the_policys_is_a_disagreement() -> None:
    with pytest.raises(Disagreement, match="at step 0 of a rollout"):
        compare(policy(0.9, 1e-2), policy(0.9, 0.0))
    with pytest.raises(Disagreement, match="of a rollout"):
        compare(policy(1.9, 1e-6), policy(1.9, 0.0))  # adds up within a few steps, which proves too little


def test_a_wrong_state_is_a_disagreement() -> None:
    def forgets(inputs: Arrays) -> Arrays:
        results = policy(1.15, 0.0)(inputs)
        return results | {"next_h": results["next_h"] * np.float32(0.5)}

    with pytest.raises(Disagreement):
        compare(forgets, policy(1.15, 0.0))
