"""Names -> implementations, through an import path that is followed only when it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def resolve(path: str) -> Any:
    """``"package.module:attribute"`` -> the attribute. Raises ImportError or AttributeError."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
