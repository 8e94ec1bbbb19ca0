"""Discard: drops the body of a refused request in the kernel.

Copying 100 KB out of the kernel is a third of the cost of a refusal. Linux drops received TCP data without a copy if
asked to with MSG_TRUNC (tcp(7)). `socket.recv` cannot do that without memory, so libc's is called.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import sys

FLAGS = socket.MSG_TRUNC | socket.MSG_DONTWAIT
_recv = ctypes.CDLL(None).recv
_recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_recv.restype = ctypes.c_ssize_t


def descriptor(transport: asyncio.BaseTransport) -> int | None:
    """The file descriptor to discard from; None with TLS, over a Unix socket and on other systems than Linux."""
    connection = transport.get_extra_info("socket")
    plain = connection.family != socket.AF_UNIX and transport.get_extra_info("ssl_object") is None
    return connection.fileno() if plain and sys.platform == "linux" else None


def discard(fd: int, count: int) -> int:
    """Drop up to `count` received bytes; returns how many. 0 if none has come, or the connection broke."""
    dropped: int = _recv(fd, None, count, FLAGS)
    return max(0, dropped)
