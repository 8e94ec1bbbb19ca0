"""ONNX Runtime with one thread, as in serving, for programs that the export runs."""

from __future__ import annotations

import re
from typing import Any

import onnxruntime as ort

from actserve.core.errors import one_line

_ORIGIN = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+ .*?\) (?=[A-Z])"
    r"|ONNX Runtime only \*guarantees\*.*? opset versions\. |The operator schemas and .*? compatibility\. "
)


def open_session(model: bytes) -> Any:
    """A session for the bytes of an `.onnx` file. ONNX Runtime raises many types, with no common base."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def reason(error: Exception) -> str:
    """The message of an error of ONNX Runtime, without its own source lines."""
    return one_line(Exception(_ORIGIN.sub("", " ".join(str(error).split())))) if str(error) else type(error).__name__
