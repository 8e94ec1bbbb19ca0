"""The policies that come with a clone, in a store of their own: into `models_store` people export theirs."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

VERSIONS = ("pong/1", "pong-lstm/1")
_CLONE = Path(__file__).parent.parent / "models_store"


def ship(store: Path) -> None:
    """Copy them to the folder `store`, which is made."""
    for version in VERSIONS:
        shutil.copytree(_CLONE / version, store / version)


_folder = TemporaryDirectory(prefix="shipped-")  # for as long as this process
SHIPPED = Path(_folder.name) / "models_store"
ship(SHIPPED)
