"""How much a certificate compares. The test has its own clock and sets the time of each call."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from actserve.core.signature import Arrays, Signature, State, TensorSpec
from actserve.store.local import ModelStore
from actserve_export.certify import effort
from actserve_export.certify.effort import Effort
from actserve_export.publish import export
from actserve_export.sources.policy_source import PolicySource
from tests import policies

SPEC = TensorSpec("observation", "float32", (2,))
SIGNATURE = Signature(
    (SPEC,), (TensorSpec("action", "float32", ()),), 256, (State(TensorSpec("h", "float32", (2,)), "next_h"),)
)


def runs(monkeypatch: pytest.MonkeyPatch, *item_s: float) -> list[Callable[[Arrays], Arrays]]:
    """Functions that take so long for each item."""
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])

    def costing(seconds: float) -> Callable[[Arrays], Arrays]:
        def run(inputs: Arrays) -> Arrays:
            now[0] += seconds * len(inputs["observation"])
            return {}

        return run

    return [costing(seconds) for seconds in item_s]


@pytest.mark.parametrize(
    ("item_s", "samples", "steps", "rows", "draws", "slow"),
    [(1e-5, 512, 200, 8, 4096, False), (1e-3, 288, 200, 2, 750, False), (0.06, 64, 100, 2, 256, True)],
)
def test_a_slow_policy_is_compared_on_fewer_samples(
    monkeypatch: pytest.MonkeyPatch, item_s: float, samples: int, steps: int, rows: int, draws: int, slow: bool
) -> None:
    policy, program = runs(monkeypatch, item_s, item_s)
    found = Effort.of(policy, [program], SIGNATURE, {"observation": SPEC.zeros(64)})
    assert (found.samples, found.steps, found.rows) == (samples, steps, rows)
    assert abs(found.draws - draws) <= 1
    assert found.slow == slow


def test_the_expected_time_is_that_of_the_slower_core(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, onnx, pt2 = runs(monkeypatch, 0.05, 0.05, 0.05)
    found = Effort.of(policy, [onnx, pt2], SIGNATURE, {"observation": SPEC.zeros(64)})
    assert found.samples_s == pytest.approx(64 * 5 * 0.05)  # the policy and four batch sizes of the .pt2
    assert effort.about(found.samples_s) == ", about 16 s"


def test_a_certificate_of_fewer_samples_has_every_kind_of_comparison(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(effort, "BUDGET_S", 0.0)
    monkeypatch.setattr(effort, "SLOW_S", 0.0)
    store = ModelStore(tmp_path)
    done = export(PolicySource(*policies.gru()), "gru", store, origin="x", runtimes=["onnx"])
    certificate = done.artifact.manifest.certificate
    assert (certificate["samples"], certificate["batch_sizes"]) == (64, [1, 3, 8, 32])
    found = certificate["programs"]["onnx"]
    assert found["compared"] == 4 * 64
    assert (found["rollout"]["steps"], found["rollout"]["compared"]) == (100, 2 * 100)
    assert np.isfinite(list(found["largest_difference"].values())).all()
