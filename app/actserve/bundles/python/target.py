"""Writes the files of a Python bundle, and runs its own verification."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from actserve.bundles.checks import run_check
from actserve.store.artifact import Artifact

PROGRAM = "policy.py"


def write(artifact: Artifact, _runtime: str, folder: Path) -> None:
    (folder / PROGRAM).write_bytes(Path(__file__).with_name(PROGRAM).read_bytes())


def verify(folder: Path, _runtime: str) -> dict[str, str]:
    versions: dict[str, str] = json.loads(run_check([sys.executable, PROGRAM, "--json"], folder))["versions"]
    return versions
