"""`actserve pin`, `rollback`, `alias`, `canary` and `shadow`: choose the versions that a service uses.

They write `routing.json` beside the versions. A running service follows the file.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actserve.cli.commands.recordings import open_recording, replay_on
from actserve.cli.stores import DEFAULT_STORE, Store, find, open_for_reading
from actserve.cli.terminal import Json, print_json
from actserve.core.errors import UsageError

if TYPE_CHECKING:
    from actserve.cli.tools.replay import Replayed
    from actserve.store.artifact import Artifact
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
    recording: Annotated[
        Path | None, typer.Option(metavar="DIR", help="First replay this recording on the version, and compare.")
    ] = None,
    at_least: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Refuse the version if it takes a smaller share of the recorded actions."),
    ] = None,
    store: Store = DEFAULT_STORE,
    json: Json = False,
) -> None:
    """Answer a share of the requests with another version. Without a version: stop.

    Exit code 1: the version was refused, and the routing is as it was.
    """
    if at_least is not None and recording is None:
        raise UsageError("--at-least is for a recording: add --recording DIR")
    if recording is not None and version is None:
        raise UsageError("--recording is for a version: add it after the name")
    models = open_for_reading(store)
    found = None if recording is None else _held_against(recording, find(models, f"{name}@{version}"), store, json)
    said = {} if found is None else {"replayed": found.as_json()}
    if found is not None and at_least is not None and found.comparison.share < at_least:
        if json:
            print_json({"name": name, "refused": True, **said})
        else:
            print(f"{found.label} gets no requests: expected the same action in at least {at_least:.2%} of the steps")
        raise typer.Exit(1)
    _print(name, resolve_name("actserve.store.routing:canary")(models, name, version, share), json, said)


def _held_against(recording: Path, artifact: Artifact, store: str, json: bool) -> Replayed:
    """The replay of a recording, which is shown unless `json`."""
    found = replay_on(artifact, open_recording(recording).of(artifact.manifest.name))
    if not json:
        from rich.console import Console

        from actserve.cli.tools.replay import show

        again = ["actserve", "replay", str(recording), "--policy", found.label, "--store", store]
        show(found, Console(), None, shlex.join(again))
    return found


def shadow(name: Name, version: Version = None, store: Store = DEFAULT_STORE, json: Json = False) -> None:
    """Also run another version and compare its actions, without returning them. Without a version: stop."""
    _print(name, resolve_name("actserve.store.routing:shadow")(open_for_reading(store), name, version), json)


ROUTING = (pin, rollback, alias, canary, shadow)


def _print(name: str, routing: Routing, json: bool, more: Mapping[str, Any] | None = None) -> None:
    """`more` is a part of the JSON."""
    if json:
        print_json({"name": name, **routing.model_dump(), **(more or {})})
        return
    print(f"{name} serves {f'version {routing.pin}' if routing.pin else 'its highest version'}")
    for alias, version in routing.aliases.items():
        print(f"  {alias} is version {version}")
    if routing.canary:
        print(f"  version {routing.canary.version} answers {routing.canary.share:.0%} of the requests")
    if routing.shadow:
        print(f"  version {routing.shadow} runs as the shadow: its actions are only compared")
