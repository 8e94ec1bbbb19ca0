"""`actserve pin`, `rollback`, `alias`, `canary` and `shadow`: choose the versions that a service uses.

They write `routing.json` beside the versions. A running service follows the file.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated

import typer

from actserve.cli.stores import DEFAULT_STORE, Store, open_for_reading
from actserve.cli.terminal import Json, print_json

if TYPE_CHECKING:
    from actserve.store.routing import Routing

Name = Annotated[str, typer.Argument(help="Name of the policy.")]
Version = Annotated[int | None, typer.Argument(min=1, help="Version number; omit to clear.")]


def pin(name: Name, version: Version = None, store: Store = DEFAULT_STORE, json: Json = False) -> None:
    """Serve this version, even if newer ones are published. Without a version: serve the highest again."""
    _print(name, resolve_name("actserve.store.routing:pin")(open_for_reading(store), name, version), json)


def rollback(name: Name, store: Store = DEFAULT_STORE, json: Json = False) -> None:
    """Pin the version before the pinned one, or before the highest."""
    _print(name, resolve_name("actserve.store.routing:roll_back")(open_for_reading(store), name), json)


def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="The alias; champion answers at /policies/NAME/versions/champion/act.")],
    version: Version = None,
    store: Store = DEFAULT_STORE,
    json: Json = False,
) -> None:
    """Give a version a name that URLs can use. Without a version: remove the alias."""
    _print(name, resolve_name("actserve.store.routing:alias")(open_for_reading(store), name, alias, version), json)


def canary(
    name: Name,
    version: Version = None,
    share: Annotated[float, typer.Option(help="Share of the requests, between 0 and 1.")] = 0.1,
    store: Store = DEFAULT_STORE,
    json: Json = False,
) -> None:
    """Answer a share of the requests with another version. Without a version: stop."""
    _print(name, resolve_name("actserve.store.routing:canary")(open_for_reading(store), name, version, share), json)


def shadow(name: Name, version: Version = None, store: Store = DEFAULT_STORE, json: Json = False) -> None:
    """Also run another version and compare its actions, without returning them. Without a version: stop."""
    _print(name, resolve_name("actserve.store.routing:shadow")(open_for_reading(store), name, version), json)


ROUTING = (pin, rollback, alias, canary, shadow)


def _print(name: str, routing: Routing, json: bool) -> None:
    if json:
        print_json({"name": name, **routing.model_dump()})
        return
    print(f"{name} serves {f'version {routing.pin}' if routing.pin else 'its highest version'}")
    for alias, version in routing.aliases.items():
        print(f"  {alias} is version {version}")
    if routing.canary:
        print(f"  version {routing.canary.version} answers {routing.canary.share:.0%} of the requests")
    if routing.shadow:
        print(f"  version {routing.shadow} runs as the shadow: its actions are only compared")
