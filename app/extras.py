"""The libraries that only playing needs: imported when they are used, and asked for by name when they are absent."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from app.errors import UsageError

EXTRAS = {"aiohttp": "async", "scipy": "evaluate"}  # every other module is of the extra `play`


def require(module: str) -> Any:
    """Import a module of an extra. Raises `UsageError` with the command that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(module.partition(".")[0], "play")
        raise UsageError(f'this needs {error.name}; install it with: pip install "actserve[{extra}]"') from error
