"""Memory that goes back to the system when it is freed. malloc keeps it in pieces that nothing else may fit into."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import numpy as np

from actserve.core.signature import Array

LARGE_BYTES = 256 << 10
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only


def trim() -> None:
    """Takes a few milliseconds, without the GIL."""
    if _trim is not None:
        _trim(0)


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """As `np.zeros`. Pages of a large array are used once something is written, without NumPy's huge pages.

    Raises `MemoryError`.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes < LARGE_BYTES:
        return np.zeros(shape, dtype)
    return allocate(size_bytes).view(dtype).reshape(shape)


def allocate(size_bytes: int) -> Array:
    """Memory for a body that is still to come, (n,) uint8. Pages of a large one are used once something is written.

    Raises `MemoryError`.
    """
    if size_bytes < LARGE_BYTES:
        return np.empty(size_bytes, np.uint8)
    try:
        return np.frombuffer(mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    except OSError as error:
        raise MemoryError(f"no memory for a body of {size_bytes} bytes: {error.strerror}") from None
