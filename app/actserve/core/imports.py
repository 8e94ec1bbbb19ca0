"""Imports of optional dependencies. If one is missing, the error names the extra to install."""

from __future__ import annotations

from importlib import import_module
from pkgutil import resolve_name
from typing import Any

from actserve.core.errors import UsageError


def import_extra(extra: str, name: str) -> Any:
    """Import the object `name` ("module:object"), which needs the optional dependencies of `extra`.

    Raises `UsageError` with the command that installs them.
    """
    try:
        return resolve_name(name) if ":" in name else import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f'this needs {error.name}; install it with: pip install "actserve[{extra}]"') from error
