"""Returns freed memory to the system. malloc keeps it in fragments that the next program may not fit into."""

from __future__ import annotations

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only


def trim() -> None:
    """Takes a few milliseconds, without the GIL."""
    if _trim is not None:
        _trim(0)
