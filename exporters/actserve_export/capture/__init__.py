"""A source -> a captured policy: the program, its `Signature`, and the reference that the program must repeat."""

from __future__ import annotations

from typing import overload

from actserve_export.capture.onnx_file import OnnxPolicy, capture_onnx_file
from actserve_export.capture.tensordict_policy import TracedPolicy, capture_policy
from actserve_export.programs.reasons import explained
from actserve_export.sources.interfaces import CapturedPolicy, ExportSource
from actserve_export.sources.onnx_source import OnnxSource
from actserve_export.sources.policy_source import PolicySource

__all__ = ["OnnxPolicy", "TracedPolicy", "capture"]


@overload
def capture(source: PolicySource) -> TracedPolicy: ...
@overload
def capture(source: OnnxSource) -> OnnxPolicy: ...
@overload
def capture(source: ExportSource) -> CapturedPolicy: ...
def capture(source: ExportSource) -> CapturedPolicy:
    """Capture `source`. Raises `CaptureFailed` if it cannot be exported, and `UsageError` for an unreadable file."""
    with explained("capture the policy"):
        if isinstance(source, OnnxSource):
            return capture_onnx_file(source)
        assert isinstance(source, PolicySource)
        return capture_policy(source)
