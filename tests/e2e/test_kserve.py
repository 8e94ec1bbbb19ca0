"""kserve's inference client, as it comes from the registry, against the service as it is started.

It has an environment of its own, `make .venv/kserve/installed`: it wants older versions of what the others need.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from actserve.cli.tools import local_service as local
from actserve.store.local import ModelStore

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".venv" / "kserve" / "bin" / "python"
STEPS = 30

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="kserve is not installed: make .venv/kserve/installed")


@pytest.mark.parametrize("runtime", ["onnx", "pt2"])
def test_an_episode_is_the_same_each_way(gru_store: ModelStore, runtime: str) -> None:
    with local.serve(gru_store.root, "--runtime", runtime) as service:
        script = Path(__file__).with_name("kserve_episode.py")
        command = [str(PYTHON), str(script), service.url, "3", str(STEPS)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["ready"] == [True, True, True, False]
    assert "no sequence '9' of gru: never begun, ended or timed out, '404 Not Found'" in found["error"]
    binary, *others = found["values"]
    assert np.shape(binary) == (STEPS, 1, 3)
    for other in others:
        np.testing.assert_allclose(other, binary, rtol=1e-5, atol=1e-6)
