"""The options that name a store, an artifact in it and the keys, and the stores that commands open with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actserve.cli.terminal import console
from actserve.core.errors import StoreUnreachable, UsageError
from actserve.core.imports import import_extra

if TYPE_CHECKING:
    from actserve.store.artifact import Artifact
    from actserve.store.local import ModelStore

DEFAULT_STORE = "models_store"

Store = Annotated[str, typer.Option(help="The model store: a folder, or a URL to read from.", envvar="ACTSERVE_STORE")]
Label = Annotated[str, typer.Argument(metavar="NAME[@VERSION]")]
TrustOption = Annotated[
    Path | None,
    typer.Option("--trust", help="Public keys, one a line, whose signatures are trusted.", envvar="ACTSERVE_TRUST"),
]
SignOption = Annotated[
    Path | None, typer.Option("--sign", metavar="KEY", help="Sign what is published with this private key.")
]


def reading(location: str, trust: Path | None = None) -> ModelStore:
    """The store at a path or behind a URL; what it has is known, or else it was said that it does not answer."""
    from actserve.store.remote import open_store
    from actserve.store.trust import Trust

    store = open_store(location, Trust.load(trust))
    try:
        store.refresh()
    except StoreUnreachable as error:
        console().print(f"{error.message}; this is about what was fetched before", soft_wrap=True)
    return store


def publishing(location: str, sign: Path | None = None) -> ModelStore:
    """The store in a folder, to publish into. Raises `UsageError`."""
    from actserve.store.local import ModelStore

    if "://" in location:
        raise UsageError(f"expected --store to be a folder; a store behind a URL is read only; got {location}")
    key = import_extra("sign", "actserve.store.trust.signing:PrivateKey").read(sign) if sign else None
    return ModelStore(Path(location), key=key)


def find(store: ModelStore, label: str) -> Artifact:
    """The artifact for `NAME` or `NAME@VERSION`. Raises `UsageError`, `NotFound` or the `StoreError` it has."""
    name, _, version = label.partition("@")
    if version and not version.isdecimal():
        raise UsageError(f"expected NAME or NAME@VERSION with a whole number; got {label!r}")
    return store.resolve(name, int(version) if version else None)
