"""Opens the best program of an artifact that this host can run."""

from __future__ import annotations

from actserve.core.errors import RuntimeFailure, RuntimeRefused
from actserve.engine.runtimes import preflight
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.load import load
from actserve.store.artifact import Artifact


def open_best(artifact: Artifact) -> tuple[Runtime | None, tuple[preflight.Choice | None, str]]:
    """The best program that loads here, with the reason for choosing it, or for having none."""
    failed: dict[str, str] = {}
    while True:
        try:
            choice = preflight.choose("auto", artifact.manifest, preflight.this_host(), failed)
        except RuntimeRefused as error:
            return None, (None, error.message)
        try:
            return load(choice.runtime, artifact), (choice, choice.reason)
        except RuntimeFailure as error:
            failed[choice.runtime] = error.message
