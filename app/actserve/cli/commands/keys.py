"""`actserve keys` and `actserve sign`: signing keys, and signing an artifact."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from actserve.cli.stores import DEFAULT_STORE, Label, Store, find, open_for_publishing
from actserve.cli.terminal import Json, print_json
from actserve.core.imports import import_extra

keys = typer.Typer(help="Create and show the keys that sign artifacts.", no_args_is_help=True)


@keys.command()
def new(
    path: Annotated[Path, typer.Argument(help="File for the new private key; the public key goes to PATH.pub.")],
    json: Json = False,
) -> None:
    """Create a key pair. Keep PATH secret; give PATH.pub to the hosts that should trust your signatures."""
    key = import_extra("sign", "actserve.store.trust.signing:PrivateKey").create(path)
    _print([key.public], json)


@keys.command()
def show(
    path: Annotated[Path, typer.Argument(help="A private key file, or a file of public keys.")], json: Json = False
) -> None:
    """Print the public keys of a file, one per line, each with its fingerprint."""
    _print(import_extra("sign", "actserve.store.trust.signing:read_keys")(path), json)


def _print(keys: Sequence[Any], json: bool) -> None:
    if json:
        print_json({"keys": [{"key": key.line, "fingerprint": key.fingerprint} for key in keys]})
        return
    for key in keys:
        print(f"{key.line} {key.fingerprint}")


def sign(
    label: Label,
    key: Annotated[Path, typer.Option(help="Private key file, from `actserve keys new`.")],
    store: Store = DEFAULT_STORE,
    json: Json = False,
) -> None:
    """Sign an artifact of the store: publish the same files as the next version, with a signature."""
    opened = open_for_publishing(store, key)
    artifact = find(opened, label)
    with tempfile.TemporaryDirectory(prefix="actserve-") as folder:
        files = {name: Path(folder) / name for name in artifact.manifest.files}
        for name, file in files.items():
            file.write_bytes(artifact.read(name))
        signed = opened.publish(dataclasses.replace(artifact.manifest, parent=artifact.manifest.version), files)
    if json:
        print_json({"name": signed.manifest.name, "version": signed.manifest.version, "signer": signed.signer})
    else:
        print(f"{signed.label} is {artifact.label}, signed by {signed.signer}")
