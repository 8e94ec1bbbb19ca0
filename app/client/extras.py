"""The libraries that only playing needs: imported when they are used, and asked for by name when they are absent."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from app.errors import UsageError


def require(module: str) -> Any:
    """Import a module of the extra `play`. Raises `UsageError` with the command that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f'this needs {error.name}; install it with: pip install "actserve[play]"') from error
