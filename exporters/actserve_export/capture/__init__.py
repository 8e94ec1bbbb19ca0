"""A source -> what is exported of it: a program with a `Signature`, and the reference that it must repeat."""

from __future__ import annotations

from typing import overload

from actserve_export.capture.onnx_file import OnnxFile, capture_onnx_file
from actserve_export.capture.tensordict_policy import Captured, capture_policy
from actserve_export.sources.interfaces import Exportable, Source
from actserve_export.sources.onnx_source import OnnxSource
from actserve_export.sources.policy_source import PolicySource

__all__ = ["Captured", "OnnxFile", "capture"]


@overload
def capture(source: PolicySource) -> Captured: ...
@overload
def capture(source: OnnxSource) -> OnnxFile: ...
@overload
def capture(source: Source) -> Exportable: ...
def capture(source: Source) -> Exportable:
    """Raises `CaptureFailed` for a policy that cannot be exported, `UsageError` for a file that cannot be read."""
    if isinstance(source, OnnxSource):
        return capture_onnx_file(source)
    assert isinstance(source, PolicySource)
    return capture_policy(source)
