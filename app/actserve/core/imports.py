"""Optional dependencies: imported where they are used, and named in the error message when they are missing."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

from actserve.core.errors import UsageError


def import_extra(extra: str, name: str) -> Any:
    """The object `name`, as `pkgutil.resolve_name` reads it, which needs the optional dependencies `extra`.

    Raises `UsageError` with the command that installs them.
    """
    try:
        return resolve_name(name)
    except ModuleNotFoundError as error:
        raise UsageError(f'this needs {error.name}; install it with: pip install "actserve[{extra}]"') from error
