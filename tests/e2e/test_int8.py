from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from actserve.engine import golden
from actserve.engine.runtimes.load import load
from actserve.store.local import ModelStore


def test_int8_is_published_with_a_certificate_of_its_own(pong_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(pong_store, tmp_path / "store"))
    command = [sys.executable, "-m", "actserve", "export", "pong", "--int8", "--store", str(store)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert result.returncode == 0, result.stderr
    assert "published pong-int8@1" in result.stderr
    assert "of the actions equal the original's" in result.stdout, "the certificate is shown"
    artifact = ModelStore(store).resolve("pong-int8")
    evidence = artifact.manifest.certificate["int8"]
    assert evidence["agreement"] >= 0.995
    assert len(evidence["scores"]["int8"]) == len(evidence["scores"]["original"]) == 1
    assert artifact.manifest.programs["onnx"].rewrites[-1].startswith("int8: ")
    assert golden.check(artifact, load("onnx", artifact).run).holds
    assert ModelStore(store).versions("pong") == [1], "the original stays what it was"
