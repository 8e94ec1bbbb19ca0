"""Checks an `.onnx` model before ONNX Runtime reads it, without the `onnx` package.

Two features of ONNX are refused:
* External tensors. ONNX Runtime reads them from the current folder even if the model was passed as bytes, also for
  tensors in attributes, subgraphs and functions. It has a setting for the folder, but none to forbid them.
* Operators of foreign domains, whose code no hash covers.

Field numbers are from https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; a test compares them with the package's
descriptors.
"""

from __future__ import annotations

from actserve.engine.runtimes.protobuf import Span, fields

DOMAINS = frozenset((b"", b"ai.onnx"))

# The submessages of each message, by field number: every path from a model to a tensor or a node.
CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto",
        22: "SparseTensorProto", 23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}  # fmt: skip
_DOMAIN = 7  # of NodeProto
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of TensorProto


def inspect_model(data: bytes) -> str | None:
    """Why ONNX Runtime must not read this model, or None."""
    pending: list[tuple[str, Span]] = [("ModelProto", (0, len(data)))]
    try:
        while pending:
            message, span = pending.pop()
            found = list(fields(data, span))
            if (reason := _refusal(message, found, data)) is not None:
                return reason
            children = CHILDREN[message]
            pending += [(children[n], value) for n, value in found if isinstance(value, tuple) and n in children]
    except ValueError:
        return "it is not an ONNX model"
    return None


def _refusal(message: str, found: list[tuple[int, int | Span]], data: bytes) -> str | None:
    if message == "TensorProto" and any(n == _EXTERNAL_DATA or (n == _DATA_LOCATION and value) for n, value in found):
        return "it has tensors in other files"
    if message == "NodeProto":
        domains = [data[slice(*value)] for n, value in found if n == _DOMAIN and isinstance(value, tuple)]
        if foreign := set(domains) - DOMAINS:
            return f"it uses an operator of {foreign.pop()[:100].decode(errors='replace')!r}, none of ONNX's own"
    return None
