"""ONNX Runtime with one thread, as in serving, for programs that the export runs."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort


def open_session(model: bytes) -> Any:
    """A session for the bytes of an `.onnx` file. ONNX Runtime raises many types, with no common base."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
