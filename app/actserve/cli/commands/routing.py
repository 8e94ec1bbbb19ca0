"""`actserve pin`, `rollback`, `alias`, `canary` and `shadow`: which versions a service of the store has act.

They write `routing.json` beside the versions; a running service follows it.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated

import typer

from actserve.cli.stores import DEFAULT_STORE, Store, reading
from actserve.cli.terminal import Json, print_json

if TYPE_CHECKING:
    from actserve.store.routing import Routing

Name = Annotated[str, typer.Argument(help="The policy.")]
Version = Annotated[int | None, typer.Argument(min=1, help="Left out: no longer.")]


def pin(name: Name, version: Version = None, store: Store = DEFAULT_STORE, json: Json = False) -> None:
    """Serve this version, whatever is published; without a version: the highest again."""
    _print(name, resolve_name("actserve.store.routing:pin")(reading(store), name, version), json)


def rollback(name: Name, store: Store = DEFAULT_STORE, json: Json = False) -> None:
    """Pin the version before the pinned one, or before the highest."""
    _print(name, resolve_name("actserve.store.routing:roll_back")(reading(store), name), json)


def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="Such as champion: /policies/NAME/versions/champion/act.")],
    version: Version = None,
    store: Store = DEFAULT_STORE,
    json: Json = False,
) -> None:
    """Let URLs have a name for a version; without a version: no longer."""
    _print(name, resolve_name("actserve.store.routing:alias")(reading(store), name, alias, version), json)


def canary(
    name: Name,
    version: Version = None,
    share: Annotated[float, typer.Option(help="Of the requests, above 0 and below 1.")] = 0.1,
    store: Store = DEFAULT_STORE,
    json: Json = False,
) -> None:
    """Have a candidate act on a share of the requests; without a version: on none."""
    _print(name, resolve_name("actserve.store.routing:canary")(reading(store), name, version, share), json)


def shadow(name: Name, version: Version = None, store: Store = DEFAULT_STORE, json: Json = False) -> None:
    """Ask a candidate too and compare its actions, which nobody gets; without a version: no longer."""
    _print(name, resolve_name("actserve.store.routing:shadow")(reading(store), name, version), json)


ROUTING = (pin, rollback, alias, canary, shadow)


def _print(name: str, wishes: Routing, json: bool) -> None:
    if json:
        print_json({"name": name, **wishes.model_dump()})
        return
    print(f"{name} serves {f'version {wishes.pin}' if wishes.pin else 'its highest version'}")
    for alias, version in wishes.aliases.items():
        print(f"  {alias} is version {version}")
    if wishes.canary:
        print(f"  version {wishes.canary.version} acts on {wishes.canary.share:.0%} of the requests")
    if wishes.shadow:
        print(f"  version {wishes.shadow} is asked, too, and compared")
