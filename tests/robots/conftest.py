"""These tests need libraries of an environment of their own: `tests/test_robots.py` runs them there."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    for kind in ("DeprecationWarning", "FutureWarning"):  # of the libraries
        config.addinivalue_line("filterwarnings", f"ignore::{kind}")


collect_ignore_glob = [] if find_spec("rsl_rl") else ["test_*.py"]

# torchvision, which LeRobot imports, registers kernels for operators that it has on a GPU only.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
if not hasattr(torch.ops.torchvision, "nms"):
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
