"""Names of the Open Inference Protocol that service and client share."""

from __future__ import annotations

HEADER = "Inference-Header-Content-Length"  # the length of a body's JSON; binary tensor data follows
DATATYPES = {
    "uint8": "UINT8",
    "int8": "INT8",
    "uint16": "UINT16",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
    "bool": "BOOL",
}
