"""Bundles: folders with a policy that run without the service, and verify their golden samples where they run."""

from __future__ import annotations

from typing import Literal

Target = Literal["browser", "cpp", "python"]
Runtime = Literal["onnx", "pt2"]
