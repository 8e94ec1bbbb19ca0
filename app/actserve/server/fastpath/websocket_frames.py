"""Headers of WebSocket frames (RFC 6455, section 5.2): reads those of clients, writes those of the server."""

from __future__ import annotations

import struct
from typing import NamedTuple

BINARY = 0x82  # a whole binary message: FIN and the opcode
_TEXT = 0x81
_CONTROL = 0x08  # the bit in the opcodes of control frames
_U16, _U64 = struct.Struct("!H"), struct.Struct("!Q")


class FrameHeader(NamedTuple):
    first: int  # FIN, three reserved bits, the opcode
    mask: bytes  # 4 bytes, or empty
    length: int  # of the payload, in bytes
    size: int  # of the header, in bytes

    @property
    def is_data(self) -> bool:
        return not self.first & _CONTROL


def read(data: bytes) -> FrameHeader | None:
    """The header at the start of `data`, or None if it is incomplete. The header is not validated."""
    if len(data) < 2:
        return None
    masked, length, size = data[1] & 0x80, data[1] & 0x7F, 2
    if length == 126:
        size = 4
        if len(data) < size:
            return None
        (length,) = _U16.unpack_from(data, 2)
    elif length == 127:
        size = 10
        if len(data) < size:
            return None
        (length,) = _U64.unpack_from(data, 2)
    if not masked:
        return FrameHeader(data[0], b"", length, size)
    if len(data) < size + 4:
        return None
    return FrameHeader(data[0], data[size : size + 4], length, size + 4)


def masked_size(length: int) -> int:
    """The size of the header of a client's frame with a payload of `length` bytes."""
    return 6 if length < 126 else 8 if length < 1 << 16 else 14


def write(message: bytes | str) -> bytes:
    """A frame of the server with a whole message, binary or text."""
    first, payload = (_TEXT, message.encode()) if isinstance(message, str) else (BINARY, message)
    length = len(payload)
    if length < 126:
        header = bytes((first, length))
    elif length < 1 << 16:
        header = bytes((first, 126)) + _U16.pack(length)
    else:
        header = bytes((first, 127)) + _U64.pack(length)
    return header + payload
