"""The command-line options for stores, artifacts and keys, and the functions that open a store."""

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

Store = Annotated[
    str, typer.Option(help="Model store: a folder, or the URL of a read-only store.", envvar="ACTSERVE_STORE")
]
Label = Annotated[
    str, typer.Argument(metavar="NAME[@VERSION]", help="Policy, and optionally its version; default: the highest.")
]
TrustOption = Annotated[
    Path | None,
    typer.Option(
        "--trust", help="File of trusted public keys, one per line; checks signatures.", envvar="ACTSERVE_TRUST"
    ),
]
SignOption = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY", help="Private key file; signs the published artifact. Default: unsigned."),
]


def open_for_reading(location: str, trust: Path | None = None) -> ModelStore:
    """The store at a path or a URL, refreshed. If a remote store does not answer, warn and use the cached artifacts."""
    from actserve.store.remote import open_store
    from actserve.store.trust import Trust

    store = open_store(location, Trust.load(trust))
    if "://" in location:
        try:
            store.refresh()
        except StoreUnreachable as error:
            console().print(f"{error.message}; using the artifacts fetched before", soft_wrap=True)
    return store


def open_for_publishing(location: str, sign: Path | None = None) -> ModelStore:
    """The store in the folder `location`, ready to publish into. Raises `UsageError` for a URL."""
    from actserve.store.local import ModelStore

    if "://" in location:
        raise UsageError(f"expected --store to be a folder; got {location}: a store behind a URL is read only")
    key = import_extra("sign", "actserve.store.trust.signing:PrivateKey").read(sign) if sign else None
    return ModelStore(Path(location), key=key)


def find(store: ModelStore, label: str) -> Artifact:
    """The artifact `NAME` or `NAME@VERSION`. Raises `UsageError`, `NotFound` or `StoreError`."""
    name, _, version = label.partition("@")
    if version and not version.isdecimal():
        raise UsageError(f"expected NAME or NAME@VERSION, with a whole number as the version; got {label!r}")
    return store.resolve(name, int(version) if version else None)
