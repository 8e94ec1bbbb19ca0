"""`actserve keys`, and `actserve sign`."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from app.commands.stores import DEFAULT_STORE, Label, Store, find, publishing
from app.lazy import resolve_extra

keys = typer.Typer(help="Make and show the keys that sign artifacts.", no_args_is_help=True)


@keys.command()
def new(path: Annotated[Path, typer.Argument(help="The private key; the public one is PATH.pub.")]) -> None:
    """Make a key: what signs stays at PATH, what others need to trust it is in PATH.pub."""
    key = resolve_extra("sign", "app.signing:PrivateKey").create(path)
    print(f"{key.public.line} {key.public.fingerprint}")


@keys.command()
def show(path: Annotated[Path, typer.Argument(help="A private key, or a file of public keys.")]) -> None:
    """Print public keys, one a line, each with its fingerprint."""
    for key in resolve_extra("sign", "app.signing:read_keys")(path):
        print(f"{key.line} {key.fingerprint}")


def sign(
    label: Label,
    key: Annotated[Path, typer.Option(help="The private key.")],
    store: Store = DEFAULT_STORE,
) -> None:
    """Vouch for an artifact that is in the store: publish the same files as its next version, signed."""
    opened = publishing(store, key)
    artifact = find(opened, label)
    with tempfile.TemporaryDirectory(prefix="actserve-") as folder:
        files = {name: Path(folder) / name for name in artifact.manifest.files}
        for name, file in files.items():
            file.write_bytes(artifact.read(name))
        signed = opened.publish(dataclasses.replace(artifact.manifest, parent=artifact.manifest.version), files)
    print(f"{signed.label} is {artifact.label}, signed by {signed.signer}")
