from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actserve.cli.main import cli
from actserve.core.errors import StoreError
from actserve.core.settings import Settings
from actserve.core.signature import Signature, TensorSpec
from actserve.engine import tuning
from actserve.engine.policy import Policy
from actserve.engine.tuning import QUICK_NS, Tuning
from actserve.engine.tuning.tuned import Tuned
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore

SIGNATURE = Signature((TensorSpec("x", "float32", (2,)),), (TensorSpec("action", "float32", ()),), max_batch=64)
SLOWER, FASTER = Tuning({1: 2000, 2: 1500}), Tuning({1: 1000, 2: 900})


@pytest.fixture
def own(cart: Artifact, tmp_path: Path) -> Artifact:
    """A copy of a policy with both programs, to write beside."""
    folder = tmp_path / cart.manifest.name / str(cart.manifest.version)
    shutil.copytree(cart.folder, folder)
    return replace(cart, folder=folder)


def test_the_batch_is_the_size_from_which_on_more_does_not_pay() -> None:
    us = 1000
    assert Tuning({1: 150 * us, 2: 108 * us, 4: 88 * us, 8: 88 * us, 16: 94 * us, 32: 96 * us}).batch == 8
    assert Tuning({1: 900 * us, 2: 900 * us, 4: 910 * us}).batch == 1
    assert Tuning({1: 900 * us, 2: 900 * us, 4: 700 * us}).batch == 4
    assert Tuning({1: QUICK_NS - 1}).quick
    assert not Tuning({1: QUICK_NS, 2: QUICK_NS // 2}).quick


@pytest.mark.parametrize(
    ("call_us", "sizes"),
    [
        ({1: 200, 2: 300, 4: 500, 8: 900, 16: 1700, 32: 3400}, 32),  # fast calls
        ({1: 4000, 2: 4100, 4: 4200, 8: 5000, 16: 9000, 32: 16_000}, 32),  # the weights are read from memory
        ({1: 4000, 2: 8000, 4: 16_000}, 4),  # slow calls that compute
        ({1: 4000, 2: 8000, 4: 8100, 8: 16_000, 16: 33_000}, 16),  # size 2 was interrupted
        ({1: 200_000}, 1),
    ],
)
def test_slow_calls_are_measured_as_long_as_larger_batches_save_a_lot(
    call_us: dict[int, int], sizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_call_ns", lambda _run, inputs: 1000 * call_us[len(inputs["x"])])
    measured = tuning.measure(lambda _: {}, SIGNATURE)
    assert max(measured.item_ns) == sizes
    assert measured.item_ns == {size: 1000 * us // size for size, us in call_us.items()}


@pytest.mark.parametrize(("onnx", "pt2"), [(SLOWER, FASTER), (FASTER, SLOWER)])
def test_auto_is_what_was_measured_to_be_the_fastest(own: Artifact, onnx: Tuning, pt2: Tuning) -> None:
    Tuned({"onnx": onnx, "pt2": pt2}).save(own)
    policy = Policy.load(own, Settings())
    fastest = "onnx" if onnx is FASTER else "pt2"
    assert (policy.choice.runtime, policy.tuning) == (fastest, FASTER)
    assert "actserve tune" in policy.choice.reason
    assert Policy.load(own, Settings(runtime="onnx")).tuning == onnx


def test_what_cannot_be_used_is_as_if_it_were_not_there(own: Artifact) -> None:
    assert Tuned.load(own) is None
    file = Tuned({"onnx": FASTER}).save(own)
    saved = json.loads(file.read_text())
    assert Tuned.load(own) == Tuned({"onnx": FASTER})
    changes: list[dict[str, object]] = [
        {"host": {**saved["host"], "cpu": "another"}},
        {"of": {"onnx": "0" * 64}},
        {"item_ns": {}},
        {"item_ns": {"onnx": {"2": 5}}},
        {"item_ns": {"onnx": {"1": 0}}},
        {"item_ns": {"onnx": [1]}},
        {"item_ns": {"other": {"1": 5}}},
    ]
    for change in changes:
        file.write_text(json.dumps(saved | change))
        assert Tuned.load(own) is None, change
    file.write_text("[" * 70_000)
    assert Tuned.load(own) is None


def test_tune_measures_and_writes_beside_the_version(own: Artifact) -> None:
    store = own.folder.parent.parent
    result = CliRunner().invoke(cli, ["tune", own.manifest.name, "--store", str(store), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    tuned = Tuned.load(own)
    assert tuned is not None
    assert (found["fastest"], set(found["batch"])) == (tuned.fastest, {"onnx", "pt2"})
    assert all(us > 0 for curve in found["item_us"].values() for us in curve.values())
    assert ModelStore(store).versions(own.manifest.name) == [own.manifest.version]
    ModelStore(store).verify(own)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_tune_measured_is_shown_even_if_it_cannot_be_written(own: Artifact, options: list[str]) -> None:
    own.beside("tuning").mkdir()  # where the file should be
    result = CliRunner().invoke(cli, ["tune", own.manifest.name, "--store", str(own.folder.parent.parent), *options])
    assert "onnx" in result.stdout
    assert isinstance(result.exception, StoreError)
    assert "tuning.json cannot be written beside" in result.exception.message
