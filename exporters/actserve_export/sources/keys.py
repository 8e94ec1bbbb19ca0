"""TensorDict keys -> the names that a program and requests use: the parts of a nested key are joined with `_`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from actserve.core.errors import CaptureFailed

Key = Any  # str or a tuple of them
RESERVED = ("is_init", "explore", "exploration", "seed", "session")  # by requests, and by inputs of a program


def key_name(key: Key) -> str:
    """``("group0", "agent0", "obs")`` -> ``group0_agent0_obs``; ``("next", "h")`` is h's own next value.

    A name that is reserved gets an underscore: ``seed`` -> ``seed_``.
    """
    name = _joined(key)
    return f"{name}_" if name in RESERVED else name


def _joined(key: Key) -> str:
    parts = (key,) if isinstance(key, str) else tuple(key)
    return "_".join(parts[1:] if parts[0] == "next" and len(parts) > 1 else parts)


def last_part(key: Key) -> str:
    return key if isinstance(key, str) else str(key[-1])


def keys_by_name(keys: Iterable[Key], kind: str, *, rename: bool = False) -> dict[str, Key]:
    """name -> key. Raises `CaptureFailed` if two keys have one name, or without `rename`, if a name is reserved.

    `kind` ("input", "output") says in errors what the keys are.
    """
    names: dict[str, Key] = {}
    for key in keys:
        name = key_name(key) if rename else _joined(key)
        if name in names and names[name] != key:
            raise CaptureFailed(f"the {kind}s {names[name]!r} and {key!r} would both be named {name!r}; rename one")
        if name in RESERVED:
            raise CaptureFailed(
                f"the {kind} {key!r} would be named {name!r}, which requests use; rename it to anything but "
                f"{', '.join(RESERVED)}"
            )
        names[name] = key
    return names


def next_key(key: Key) -> Key:
    """Where a module writes the next value of `key`: ("next", key)."""
    return ("next", *((key,) if isinstance(key, str) else key))
