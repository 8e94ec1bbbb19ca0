"""Runs a bundle's own check as a process."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from actserve.core.errors import RuntimeFailure

LIMIT_S = 600.0
SHOWN = 400  # characters of what a check says


def run_check(command: Sequence[str], folder: Path, limit_s: float = LIMIT_S) -> str:
    """Run a command in `folder` -> its output. Raises `RuntimeFailure` with the end of its errors if it fails."""
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeFailure(f"expected {Path(command[0]).name} to end in {limit_s:g} s; it still runs") from None
    if found.returncode:
        said = (found.stderr.strip() or found.stdout.strip())[-SHOWN:]
        raise RuntimeFailure(said or f"{Path(command[0]).name} ended with exit code {found.returncode}")
    return found.stdout
