from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from actserve.cli.tools.doctor import RUNS, ProgramStatus, diagnose, print_diagnosis
from actserve.core.errors import UnknownPolicy
from actserve.engine.runtimes.preflight import this_host
from actserve.store.artifact import Program
from actserve.store.local import ModelStore
from tests.publishing import republish


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_was_built_here_runs_here(cart_store: ModelStore) -> None:
    steps: list[str] = []
    diagnosis = diagnose(cart_store, "cart", progress=steps.append)
    assert diagnosis.rows == [ProgramStatus("cart@1", "onnx", True, RUNS), ProgramStatus("cart@1", "pt2", True, RUNS)]
    assert diagnosis.host["glibcxx"]
    assert steps == ["cart@1"]
    assert json.loads(json.dumps(diagnosis.as_json()))["programs"][0]["runs"] is True


def test_every_version_has_its_reason(own_store: ModelStore) -> None:
    artifact = own_store.resolve("cart")
    programs = {**artifact.manifest.programs, "pt2": Program("policy.pt2", {"glibc": "99.1"})}
    republish(artifact, own_store, programs=programs)  # 2: for a newer glibc
    republish(artifact, own_store)  # 3: will be damaged
    republish(artifact, own_store)  # 4: will be unreadable
    damaged = own_store.root / "cart" / "3" / "policy.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    (own_store.root / "cart" / "4" / "policy.onnx").unlink()
    host = dataclasses.replace(this_host(), packages={"onnxruntime": "1.31.1", "torch": "2.13.0"}, glibc=(2, 36))
    rows = {(row.policy, row.runtime): row for row in diagnose(own_store, host=host).rows}
    assert rows["cart@4", None].reason == "cart@4: policy.onnx is in the manifest and not in the folder"
    assert rows["cart@3", "onnx"].reason.startswith("policy.onnx is not what was published: its SHA-256")
    assert rows["cart@2", "onnx"].runs
    assert rows["cart@2", "pt2"].reason == "needs glibc 99.1, this host has 2.36"
    assert next(iter(rows))[0] == "cart@4", "the newest first"


def test_without_torch_the_reason_is_that(cart_store: ModelStore) -> None:
    host = dataclasses.replace(this_host(), packages={"onnxruntime": "1.31.1"})
    rows = diagnose(cart_store, "cart", host).rows
    assert [(row.runs, row.reason) for row in rows] == [(True, RUNS), (False, "torch is not installed here")]


def test_an_unknown_policy(cart_store: ModelStore) -> None:
    with pytest.raises(UnknownPolicy):
        diagnose(cart_store, "none")


def test_it_is_printed_for_people(cart_store: ModelStore) -> None:
    host = dataclasses.replace(
        this_host(), packages={"onnxruntime": "1.31.1"}, devices=("cpu", "cuda"), compute_capability=(9, 0)
    )
    output = io.StringIO()
    print_diagnosis(diagnose(cart_store, host=host), Console(file=output, width=200))
    text = output.getvalue()
    assert "GLIBCXX 3.4" in text
    assert "cpu, cuda (compute capability 9.0)" in text
    assert "cart@1 .pt2" in text
    assert "torch is not installed here" in text
