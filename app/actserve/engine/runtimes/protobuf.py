"""Reads and changes protobuf messages without their descriptors.

A message is a list of (number, type, value); anything else is refused with `ValueError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; ONNX has no groups, so they are refused
Span = tuple[int, int]


def fields(data: bytes, span: Span) -> Iterator[tuple[int, int | Span]]:
    """(number, value) of each field of the message in `span`; the value is a number or a span of bytes."""
    for number, value, _ in _fields(data, span):
        yield number, value


def changed(data: bytes, path: tuple[int, ...], change: Callable[[bytes], bytes]) -> bytes:
    """The message `data` with `change` applied to every submessage or string at `path`, the numbers of fields."""
    if not path:
        return change(data)
    parts = []
    start = 0
    for number, value, end in _fields(data, (0, len(data))):
        if number == path[0] and isinstance(value, tuple):
            new = changed(data[slice(*value)], path[1:], change)
            parts += [_encoded(number << 3 | _BYTES), _encoded(len(new)), new]
        else:
            parts.append(data[start:end])
        start = end
    return b"".join(parts)


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, int | Span, int]]:
    """(number, value, where the next field begins)."""
    at, end = span
    while at < end:
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if number == 0 or key >> 32:
            raise ValueError
        if wire == _VARINT:
            value, at = _varint(data, at, end)
            yield number, value, at
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, end)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError
        if size > end - at:
            raise ValueError
        yield number, (at, at + size), at + size
        at += size


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """(value, position of the next byte)."""
    value = 0
    for position in range(at, min(at + 10, end)):
        value |= (data[position] & 0x7F) << (7 * (position - at))
        if data[position] < 0x80:
            return value, position + 1
    raise ValueError


def _encoded(value: int) -> bytes:
    """`value` as a varint."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
