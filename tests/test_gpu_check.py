"""The check for GPUs, its parts on a CPU: the same code, without pinned memory and CUDA graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actserve.core.signature import Array
from actserve.engine.runtimes.aoti_package import call
from actserve.store.local import ModelStore
from tests.gpu import batches
from tests.gpu.check import PARTS, Check, Failed, run

SCRIPT = Path(__file__).parent / "gpu" / "check.sh"
SIZES = (1, 3, 300)  # 300 is more than a program takes in one call


def check_of(store: ModelStore, folder: Path) -> Check:
    return Check("cpu", SIZES, 0.001, store, "cart", folder)


def test_every_part_passes_on_a_cpu(own_store: ModelStore, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    assert run(check_of(own_store, tmp_path), found.update)
    assert {name: part["outcome"] for name, part in found.items()} == {part.__name__: "passed" for part in PARTS}
    assert found["program"]["action_disagreements"] == 0
    assert {size for row in found["frames"].values() if isinstance(row, dict) for size in row} == set(SIZES)
    assert found["frames"]["pinned buffers"].startswith("skipped: cpu has no pinned memory")
    assert found["limits"]["operations a frame"] == 2 * (4 * 16 + 16 * 3)
    assert found["served"]["actions/s"] > 0
    assert json.dumps(found)


@pytest.mark.parametrize("size", SIZES)
def test_a_wrong_result_at_any_size_is_found(
    own_store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def wrong_at_the_end(package: Any, arrays: list[Array], device: str) -> list[Array]:
        action, *others = call(package, arrays, device)
        if len(action) == size % 256:  # 300 items are 256 and 44
            action[-1] = (action[-1] + 1) % 3
        return [action, *others]

    monkeypatch.setattr(batches, "call", wrong_at_the_end)
    check = check_of(own_store, tmp_path)
    check.program()
    with pytest.raises(Failed, match=f"^the service, batch {size}: 1 of {size} entries of output 0 differ$") as failed:
        check.frames()
    assert failed.value.found["program alone"].keys() == set(SIZES), "the other ways go on"


def test_without_a_gpu_the_check_says_so_and_fails(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(SCRIPT), "--sizes", "1", "--json", str(tmp_path / "found.json")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["environment"]["reason"] == "torch sees no CUDA device"
    assert found["program"]["outcome"] == "failed"
    assert found["frames"] == {"outcome": "skipped", "seconds": 0.0, "reason": "there is no program"}


def test_without_torch_the_script_says_so() -> None:
    done = subprocess.run(
        [str(SCRIPT)], env={**os.environ, "PYTHON": "false"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "found no Python that imports torch; set PYTHON\n")
