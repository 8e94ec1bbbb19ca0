"""What an `.onnx` model may hold. Read off the bytes, before ONNX Runtime sees them and without the `onnx` package.

ONNX Runtime reads a model's external tensors from disk even where the model was given as bytes: from the process's
current folder, also for tensors inside attributes, subgraphs and functions. It has a setting for where they are looked
for, none to forbid them. And an operator of a domain that is not ONNX's own is code that no hash covers. So the few
fields that matter are looked at here: a protobuf message is a list of (number, type, value), and whatever is not such
a list is refused. Numbers from https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; a test holds them to the
package's own descriptors.
"""

from __future__ import annotations

from collections.abc import Iterator

DOMAINS = frozenset((b"", b"ai.onnx"))

# The messages below each message, by field number: every way from a model to a tensor or a node.
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
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; groups, which ONNX never had, are none
Span = tuple[int, int]


def inspect_model(data: bytes) -> str | None:
    """Why ONNX Runtime must not see this model, or None."""
    waiting: list[tuple[str, Span]] = [("ModelProto", (0, len(data)))]
    try:
        while waiting:
            message, span = waiting.pop()
            fields = list(_fields(data, span))
            if (reason := _objection(message, fields, data)) is not None:
                return reason
            children = CHILDREN[message]
            waiting += [(children[n], value) for n, value in fields if isinstance(value, tuple) and n in children]
    except ValueError:
        return "it is not an ONNX model"
    return None


def _objection(message: str, fields: list[tuple[int, int | Span]], data: bytes) -> str | None:
    if message == "TensorProto" and any(n == _EXTERNAL_DATA or (n == _DATA_LOCATION and value) for n, value in fields):
        return "it has tensors in other files"
    if message == "NodeProto":
        domains = [data[slice(*value)] for n, value in fields if n == _DOMAIN and isinstance(value, tuple)]
        if foreign := set(domains) - DOMAINS:
            return f"it uses an operator of {foreign.pop()[:100].decode(errors='replace')!r}, none of ONNX's own"
    return None


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, int | Span]]:
    """(number, value) of each field of one message: a number, or where its bytes are. Raises `ValueError`."""
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
    """(value, where the next byte is). Raises `ValueError`."""
    value = 0
    for position in range(at, min(at + 10, end)):
        value |= (data[position] & 0x7F) << (7 * (position - at))
        if data[position] < 0x80:
            return value, position + 1
    raise ValueError
