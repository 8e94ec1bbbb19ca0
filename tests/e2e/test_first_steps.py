"""The README's commands in their order, each in the folder as the one before leaves it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import urllib3
from rich.console import Console

from actserve.cli.tools import local_service as local
from actserve.cli.tools import play_and_load as playing
from actserve.engine import golden
from actserve.store.local import ModelStore
from actserve_export import bench, demo
from tests.exported import ROOT
from tests.publishing import republish
from tests.shipped import ship


def test_demo_serve_curl_play_and_bench(pong_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ship(Path("models_store"))
    store = ModelStore(Path("models_store"))
    republish(ModelStore(pong_store).resolve("pong"), store)  # as `make demo` exports it; it finds that here

    monkeypatch.setattr(playing, "play", partial(playing.play, max_steps=20))
    demo.main()
    assert store.versions("pong") == [1, 2]
    assert Path("models_store/pong/2.tuning.json").exists()

    artifact = store.resolve("pong")
    inputs, outputs = golden.read(artifact)
    with local.serve(store.root) as service:
        raw = {"Content-Type": "application/octet-stream"}
        answer = urllib3.request("POST", f"{service.url}/act", body=inputs["pixels"][0].tobytes(), headers=raw)
        assert answer.json() == {"action": outputs["action"][0]}
        assert playing.play(service.url, None, console=Console(quiet=True)).steps == 20

    ways = [row.way for row in bench.run(artifact, str(store.root), 5, Console(quiet=True))]
    assert ways == ["TorchRL", ".pt2", ".onnx", ".pt2 through HTTP", ".onnx through HTTP"]


@pytest.mark.wide
def test_the_benchmark_of_the_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ship(Path("models_store"))
    for name in (".cache", "exporters"):
        Path(name).symlink_to(ROOT / name)
    tiny = ["--only", "actserve", "--connections", "1", "--seconds", "0.2", "--rounds", "1", "--json", "cost.json"]
    command = [sys.executable, "-m", "tests.benchmarks.cost", *tiny]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500, env=environment)
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(Path("cost.json").read_text())["cells"]
    assert cell["actions"] > 0
