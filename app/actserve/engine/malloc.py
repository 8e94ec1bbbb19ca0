"""Give memory that was freed back to the system: malloc keeps it, in pieces that the next program may not fit into."""

from __future__ import annotations

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and no need of it


def give_back() -> None:
    """Takes a few milliseconds, without the GIL."""
    if _trim is not None:
        _trim(0)
