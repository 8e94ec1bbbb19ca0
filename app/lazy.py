"""Names -> implementations, through an import path that is followed only when it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from app.errors import UsageError


def resolve(path: str) -> Any:
    """``"package.module:attribute"`` -> the attribute; ``"package.module"`` -> the module. Raises ImportError or
    AttributeError."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute) if attribute else import_module(module)


def resolve_extra(extra: str, path: str) -> Any:
    """The same for what needs an extra of this package. Raises `UsageError` with the command that installs it."""
    try:
        return resolve(path)
    except ModuleNotFoundError as error:
        raise UsageError(f'this needs {error.name}; install it with: pip install "actserve[{extra}]"') from error
