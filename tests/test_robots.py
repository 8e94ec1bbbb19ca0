"""Runs tests/robots in `.venv/robots`, which has the libraries that train robots' policies.

`make .venv/robots/installed` makes it. There, `python -m pytest tests/robots` runs them directly.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv" / "robots" / "bin" / "python"
FILES = sorted(path.name for path in (ROOT / "tests" / "robots").glob("test_*.py"))

pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(not PYTHON.exists(), reason="the libraries are not installed: make .venv/robots/installed"),
]


@pytest.mark.parametrize("file", FILES)
def test_a_librarys_policies(file: str) -> None:
    command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/robots/{file}"]
    path = os.pathsep.join(map(str, (ROOT / "app", ROOT / "exporters", ROOT)))
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
