"""Checks an `.onnx` model before ONNX Runtime reads it, without the `onnx` package.

Two features of ONNX are refused:
* External tensors. ONNX Runtime reads them from the current folder even if the model was passed as bytes, also for
  tensors in attributes, subgraphs and functions. It has a setting for the folder, but none to forbid them.
* Operators of foreign domains, whose code no hash covers.

The check parses only the protobuf fields that it needs. A message is a list of (number, type, value); anything else is
refused. Field numbers are from https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; a test compares them with the
package's descriptors.
"""

from __future__ import annotations

from collections.abc import Iterator

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
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; ONNX has no groups, so they are refused
Span = tuple[int, int]


def inspect_model(data: bytes) -> str | None:
    """Why ONNX Runtime must not read this model, or None."""
    pending: list[tuple[str, Span]] = [("ModelProto", (0, len(data)))]
    try:
        while pending:
            message, span = pending.pop()
            fields = list(_fields(data, span))
            if (reason := _refusal(message, fields, data)) is not None:
                return reason
            children = CHILDREN[message]
            pending += [(children[n], value) for n, value in fields if isinstance(value, tuple) and n in children]
    except ValueError:
        return "it is not an ONNX model"
    return None


def _refusal(message: str, fields: list[tuple[int, int | Span]], data: bytes) -> str | None:
    if message == "TensorProto" and any(n == _EXTERNAL_DATA or (n == _DATA_LOCATION and value) for n, value in fields):
        return "it has tensors in other files"
    if message == "NodeProto":
        domains = [data[slice(*value)] for n, value in fields if n == _DOMAIN and isinstance(value, tuple)]
        if foreign := set(domains) - DOMAINS:
            return f"it uses an operator of {foreign.pop()[:100].decode(errors='replace')!r}, none of ONNX's own"
    return None


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, int | Span]]:
    """(number, value) of each field of a message; the value is a number or a span of bytes. Raises `ValueError`."""
    at, end = span
    while at < end:
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if number == 0 or key >> 32:
            raise ValueError
        if wire == _VARINT:
            value, at = _varint(data, at, end)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, end)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError
        if size > end - at:
            raise ValueError
        yield number, (at, at + size)
        at += size


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """(value, position of the next byte). Raises `ValueError`."""
    value = 0
    for position in range(at, min(at + 10, end)):
        value |= (data[position] & 0x7F) << (7 * (position - at))
        if data[position] < 0x80:
            return value, position + 1
    raise ValueError
