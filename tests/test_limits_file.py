"""The file of `actserve export --limits`, and limits that do not fit a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actserve.core.errors import UsageError
from actserve_export import PolicySource, from_module
from actserve_export.capture import capture
from actserve_export.capture.limits.policy import limit
from actserve_export.sources.limits_file import parse_limits, read_limits
from tests import policies


def identity(example: Any) -> Callable[[], PolicySource]:
    return lambda: from_module(nn.Identity(), example, "identity")


FLOATS, INTEGERS = identity(torch.zeros(2)), identity(torch.zeros(2, dtype=torch.int64))
SWITCH, HALVES = identity(torch.zeros(1, dtype=torch.bool)), identity(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("make", "section", "message"),
    [
        (FLOATS, 3, "action: expected some of low, high, change, .*; got 3"),
        (FLOATS, {"lo": 1, "fallback": 0}, "action.lo: unknown; expected some of low, high"),
        (FLOATS, {"low": 1}, "action.fallback: expected hold or numbers"),
        (FLOATS, {"low": [1, 2, 3], "fallback": 0}, r"action.low: expected one number or 2, .*; got 3"),
        (FLOATS, {"low": "a", "fallback": 0}, "action.low: expected a number or a list of numbers; got 'a'"),
        (FLOATS, {"low": True, "fallback": 0}, "action.low: expected a number .*; got True"),
        (FLOATS, {"low": [], "fallback": 0}, "action.low: expected a number"),
        (FLOATS, {"low": [[1], 2], "fallback": 0}, "action.low: expected a number"),
        (FLOATS, {"high": float("inf"), "fallback": 0}, "action.high: expected finite numbers; got inf"),
        (FLOATS, {"high": 1e39, "fallback": 0}, "action.high: expected numbers of float32"),
        (FLOATS, {"low": [0, 2], "high": 1, "fallback": 0}, "action.low: expected at most 1, which is high"),
        (FLOATS, {"change": 0, "fallback": 0}, "action.change: expected more than 0; got 0"),
        (FLOATS, {"low": 1, "fallback": 0}, "action.fallback: expected values within the bounds, 1 to inf"),
        (FLOATS, {"high": 1, "change": 1, "start": 2, "fallback": 0}, "action.start: expected values within"),
        (FLOATS, {"start": 0, "fallback": 0}, "action.start: expected change, dwell or fallback: hold"),
        (FLOATS, {"fallback": "keep"}, "action.fallback: expected a number or a list of numbers; got 'keep'"),
        (FLOATS, {"allowed": [1], "fallback": 1}, "expected whole numbers for allowed, .*; got float32"),
        (INTEGERS, {"low": 0.5, "fallback": 1}, "action.low: expected whole numbers for int64"),
        (INTEGERS, {"change": 1, "fallback": 1}, "change of whole numbers needs low and high"),
        (INTEGERS, {"forbidden": [1], "fallback": 0}, "expected allowed: it is not known how many actions"),
        (INTEGERS, {"low": 0, "allowed": [1], "fallback": 1}, "action.low: expected bounds, or allowed"),
        (INTEGERS, {"allowed": [1.5], "fallback": 1}, "action.allowed.0: .*integer.*; got 1.5"),
        (INTEGERS, {"allowed": [], "fallback": 1}, "action.allowed: .*at least 1 item"),
        (policies.cart, {"allowed": [3], "fallback": 3}, "action.allowed: expected 0 to 2; got 3"),
        (policies.cart, {"forbidden": [0, 1, 2], "fallback": 0}, "expected an action that is allowed"),
        (policies.cart, {"forbidden": [1], "fallback": 1}, r"fallback: expected an allowed action, one of \[0, 2\]"),
        (policies.cart, {"dwell": 0, "fallback": 1}, "action.dwell: .*greater than or equal to 1; got 0"),
        (SWITCH, {"fallback": 0}, "expected an output of float16, .*; got bool"),
        (HALVES, {"fallback": 0}, "expected an output of float16, .*; got bfloat16"),
    ],
)
def test_limits_that_do_not_fit_are_refused_by_name(
    make: Callable[[], PolicySource], section: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        limit(capture(make()), parse_limits({"action": section}))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "limits: expected limits by the name of an output"),
        ({"observations": "finite"}, "limits: expected limits by the name of an output"),
        ({"actoin": {"fallback": 0}}, "limits: actoin: no such output; the policy gives action"),
        ({"action": {"fallback": 0}, "observations": "some"}, "observations: expected finite; got 'some'"),
    ],
)
def test_a_document_that_does_not_fit_is_refused(document: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        limit(capture(FLOATS()), parse_limits(document))


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text("observations: finite\naction:\n  low: [-1, -1.5]\n  change: 1e-3  # per step\n  fallback: hold\n")
    found = read_limits(path)
    assert found.finite_observations
    section = found.outputs["action"]
    assert section.low is not None
    assert section.change is not None
    assert (section.low.tolist(), section.change.tolist(), section.fallback) == ([-1, -1.5], 1e-3, "hold")
    for text, message in (
        ("action: [", "limits.yaml is not YAML: .*line 1"),
        ("action: {low: 1, low: 2, fallback: 0}", "'low' comes twice.*line 1"),
        ("- 3", "limits.yaml: expected limits by the name of an output"),
        ("", "limits.yaml: expected limits by the name of an output"),
        ("3: {fallback: 0}", "limits.yaml: 3: .*string"),
        ("action: {low: .nan, fallback: 0}", "limits.yaml: action.low: expected finite numbers"),
        ("action: !!python/object:os.system {}", "limits.yaml is not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_limits(path)
    with pytest.raises(UsageError, match=r"none\.yaml cannot be read"):
        read_limits(tmp_path / "none.yaml")
