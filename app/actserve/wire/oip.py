"""What both ends of the Open Inference Protocol call things."""

from __future__ import annotations

HEADER = "Inference-Header-Content-Length"  # where a body's JSON ends and its binary tensor data begins, in bytes
DATATYPES = {"uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float32": "FP32", "float64": "FP64", "bool": "BOOL"}
