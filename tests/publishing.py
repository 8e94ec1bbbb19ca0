"""An artifact once more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore


def republish(
    artifact: Artifact, store: ModelStore, files: Mapping[str, Path] | None = None, **changes: Any
) -> Artifact:
    """The next version of what `artifact` is, with some `files` by name in place of its own or beside them, and with
    `changes` of the manifest; every hash is right."""
    own = {name: artifact.folder / name for name in artifact.manifest.files}
    return store.publish(replace(artifact.manifest, **changes), {**own, **(files or {})})
