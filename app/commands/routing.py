"""`actserve pin`, `rollback`, `alias`, `canary` and `shadow`: which versions a service of the store has act.

They write `routing.json` beside the versions; a running service follows it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from app import routing
from app.commands.stores import DEFAULT_STORE, Store, reading
from app.routing import Routing

Name = Annotated[str, typer.Argument(help="The policy.")]
Version = Annotated[int | None, typer.Argument(min=1, help="Left out: no longer.")]


def pin(name: Name, version: Version = None, store: Store = DEFAULT_STORE) -> None:
    """Serve this version, whatever is published; without a version: the highest again."""
    _print(name, routing.pin(reading(store), name, version))


def rollback(name: Name, store: Store = DEFAULT_STORE) -> None:
    """Pin the version before the pinned one, or before the highest."""
    _print(name, routing.roll_back(reading(store), name))


def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="Such as champion: /policies/NAME/versions/champion/act.")],
    version: Version = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Let URLs have a name for a version; without a version: no longer."""
    _print(name, routing.alias(reading(store), name, alias, version))


def canary(
    name: Name,
    version: Version = None,
    share: Annotated[float, typer.Option(help="Of the requests, above 0 and below 1.")] = 0.1,
    store: Store = DEFAULT_STORE,
) -> None:
    """Have a candidate act on a share of the requests; without a version: on none."""
    _print(name, routing.canary(reading(store), name, version, share))


def shadow(name: Name, version: Version = None, store: Store = DEFAULT_STORE) -> None:
    """Ask a candidate too and compare its actions, which nobody gets; without a version: no longer."""
    _print(name, routing.shadow(reading(store), name, version))


ROUTING = (pin, rollback, alias, canary, shadow)


def _print(name: str, wishes: Routing) -> None:
    print(f"{name}: {wishes.model_dump_json(exclude_none=True)}")
