"""The folder for what can be had again: `$XDG_CACHE_HOME/actserve`, by default `~/.cache/actserve`."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """None for a user without a home who names no folder."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "actserve"
