"""Stores that take long to make: each is exported once, by whichever process of the tests is the first to need it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from actserve.store.local import ModelStore


def exported(factory: pytest.TempPathFactory, target: str) -> ModelStore:
    """A store with version 1 of what `actserve export target` exports, both programs. To be looked at, not changed."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers have
    root = folder / f"exported-{target.rpartition(':')[2]}"
    with open(f"{root}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            _export(target, root)
    return ModelStore(root)


def _export(target: str, root: Path) -> None:
    from actserve_export.publish import export
    from actserve_export.targets import load

    name, source = load(target)
    making = root.with_name(f"{root.name}.part")
    export(source, name, ModelStore(making), origin=target)
    making.rename(root)
