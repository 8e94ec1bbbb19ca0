"""The remote store against an S3 server: moto's, through s3fs. A proxy between them makes rarer faults.

Both have an environment of their own, `make .venv/s3/installed`: they want older versions of what the others need.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".venv" / "s3" / "bin" / "python"
EXPECTED = {
    "listed": [1],
    "fetched": "walker@1",
    "throttled for a while": "walker@2",
    "throttled for ever": "store_unreachable",
    "after it": [1, 2],
    "cut": "store_unreachable",
    "cut: left behind": ["1", "2"],
    "fetched after the cut": "walker@3",
    "a listing that lags": [1, 2, 3],
    "a listing that has caught up": [1, 2, 3, 4],
    "a manifest that is not there yet": "unfinished_version",
    "and then is": "walker@5",
    "expired: listed": "store_unreachable",
    "expired: fetched": "store_unreachable",
    "expired: what was fetched before": "walker@1",
    "expired: still listed": [1, 2, 3, 4, 5, 6],
    "renewed": "walker@6",
}

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="moto and s3fs are not installed: make .venv/s3/installed")


@pytest.fixture(scope="module")
def found() -> Any:
    script = Path(__file__).with_name("s3_episode.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "app")}
    command = [str(PYTHON), str(script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("scenario", EXPECTED)
def test_a_store_in_s3(found: Any, scenario: str) -> None:
    assert found[scenario]["found"] == EXPECTED[scenario]
    assert found[scenario]["soon"]


def test_every_scenario_is_expected(found: Any) -> None:
    assert found.keys() == EXPECTED.keys()
