"""Policies with limits as they are published and served: manifest, certificate, inspect, sessions, counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import urllib3
from torch import nn

from actserve import Realtime, RemotePolicy, Stream
from actserve.cli.tools import local_service as local
from actserve.core.errors import ServiceError, UsageError
from actserve.core.limits import Reason
from actserve.store.artifact import FORMAT, WITHOUT_LIMITS, Artifact
from actserve.store.local import ModelStore
from actserve_export import Chunk, export, from_module
from actserve_export.compile import compile as compile_artifact
from tests import policies
from tests.command_line import actserve
from tests.exported import made_once
from tests.test_action_limits import EXPLORES, FUZZED, follow, source_of

ARM = {"action": {"low": -1, "high": 1, "change": 0.25, "fallback": "hold"}}
SLOWER = {"action": {**ARM["action"], "change": 0.2}}
PLAN = {"action": {"change": 0.5, "fallback": "hold"}}
CHOOSE = {"action": {"forbidden": [1], "fallback": 0}}


@pytest.fixture(scope="module")
def store() -> ModelStore:
    """`arm` follows its observation and has state; `choose` has none; `plan` plans chunks."""

    def make(folder: Path) -> None:
        for name, source, limits in (
            ("arm", follow(), ARM),
            ("choose", from_module(nn.Identity(), torch.zeros(3), "argmax"), CHOOSE),
            ("plan", replace(follow((4, 1)), chunk=Chunk("action", 2)), PLAN),
        ):
            export(source, name, folder, runtimes=["onnx"], limits=limits, fuzzed=FUZZED)

    return ModelStore(made_once("limited", make, [Path(__file__)]))


def artifact_of(store: ModelStore, name: str) -> Artifact:
    return store.resolve(name, 1)


def test_the_manifest_says_the_limits_and_what_was_shown_of_them(store: ModelStore) -> None:
    manifest = artifact_of(store, "arm").manifest
    assert manifest.format == FORMAT
    written = json.loads((artifact_of(store, "arm").folder / "manifest.json").read_text())
    assert written["signature"]["limits"]["outputs"][0]["change"] == [0.25, 0.25]
    shown = manifest.certificate["limits"]
    found = shown["programs"]["onnx"]
    assert found["inputs"] >= FUZZED
    assert found["outside"] == 0
    assert found["limited"] >= max(found["reasons"].values()) > 0
    assert shown["outside_without_limits"] > FUZZED / 4
    assert shown["equal_where_not_limited"] > 0
    assert manifest.certificate["original"]["action_disagreements"] == 0, "compared without the limits"


def test_a_manifest_without_limits_is_as_before(tmp_path: Path) -> None:
    manifest = export(follow(), "plain", tmp_path, runtimes=["onnx"]).artifact.manifest
    assert manifest.format == WITHOUT_LIMITS
    assert "limits" not in manifest.to_dict()["signature"]
    assert manifest.signature.limits is None


def test_other_limits_or_more_fuzzing_are_another_export(tmp_path: Path) -> None:
    own = ModelStore(tmp_path)
    for limits, fuzzed, published, version in (
        (ARM, 256, True, 1),
        (ARM, 256, False, 1),
        (SLOWER, 256, True, 2),
        (SLOWER, 512, True, 3),
    ):
        done = export(follow(), "arm", own, runtimes=["onnx"], limits=limits, fuzzed=fuzzed)
        assert (done.published, done.artifact.manifest.version) == (published, version)


def test_inspect_shows_the_limits_and_the_fuzzing(store: ModelStore) -> None:
    shown = actserve("inspect", "arm", "--store", str(store.root)).stdout
    assert "limits  action: -1 to 1, change at most 0.25 a step, not finite: hold" in shown
    assert "gives  limited: uint8[]" in shown
    assert "takes  previous_action: float32[2]" in shown
    assert " fuzzed inputs, " in shown
    assert ", 0 outside" in shown
    chosen = actserve("inspect", "choose", "--store", str(store.root)).stdout
    assert "limits  action: one of [0, 2], not finite: 0" in chosen


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "follows.py").write_text(
        "import torch\n\n\ndef arm():\n    return torch.nn.Identity(), torch.zeros(2)\n"
    )
    (tmp_path / "limits.yaml").write_text("action: {low: -1, high: 1, change: 0.25, fallback: hold}\n")
    options = ("--action", "identity", "--runtime", "onnx", "--store", "store")
    done = actserve("export", "follows:arm", *options, "--limits", "limits.yaml", "--fuzz", "512", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "limits of .onnx: 512 fuzzed inputs" in done.stdout
    for arguments, message in (
        (("--fuzz", "5"), "--fuzz is for the limits: add --limits FILE"),
        (("--limits", "none.yaml"), "none.yaml cannot be read"),
    ):
        refused = actserve("export", "follows:arm", *options, *arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert message in " ".join(refused.stderr.split())


@pytest.fixture(scope="module")
def url(store: ModelStore) -> Iterator[str]:
    with local.serve(store.root, "--runtime", "onnx", "--workers", "1") as service:
        yield service.url


def call(url: str, method: str, path: str, body: Any = None, **headers: str) -> Any:
    with urllib3.PoolManager() as http:
        answer = http.request(method, url + path, json=body, headers=headers or None)
        assert answer.status < 300, answer.data
        return answer.json()


TARGETS = [[0.0, 0.0], [1.0, -1.0], [1e9, -1.0], [0.0, 0.0]]
FOLLOWED = [[0, 0], [0.25, -0.25], [0.5, -0.5], [0.25, -0.25]]


def test_sessions_streams_and_clients_keep_the_previous_action(url: str) -> None:
    targets = [np.array(target, np.float32) for target in TARGETS]
    with RemotePolicy(url, "arm") as policy:
        assert policy.signature.limits is not None
        with policy.session() as session:
            assert [session.act(target).tolist() for target in targets] == FOLLOWED
        episode = policy.episode()
        assert [episode.act(target).tolist() for target in targets] == FOLLOWED
        assert policy.act(targets[1]).tolist() == [1, -1], "a request without state is a first step"
    with Stream(url, "arm") as stream:
        assert [stream.act(target).tolist() for target in targets] == FOLLOWED


def test_actions_of_chunks_are_handed_out_in_turn_or_not_at_all(url: str) -> None:
    plans = [np.full((4, 1), target, np.float32) for target in (0, 9, 9, 9, 9)]
    with RemotePolicy(url, "plan") as policy, policy.session(chunk="step") as session:
        assert [float(session.act(plan)[0]) for plan in plans] == [0, 0, 0.5, 1, 1.5]
    with Stream(url, "plan", chunk="step") as stream:
        assert [float(stream.act(plan)[0]) for plan in plans] == [0, 0, 0.5, 1, 1.5]
    with pytest.raises(ServiceError, match="expected ahead=0"), Stream(url, "plan", chunk="step", ahead=1):
        pass
    with pytest.raises(UsageError, match="plan limits the change between two actions"), Realtime(url, "plan"):
        pass


def test_the_service_says_and_counts_what_it_limited(url: str) -> None:
    def counts() -> dict[str, int]:
        found: dict[str, int] = call(url, "GET", "/policies/choose/stats").get("limited", {})
        return found

    before = counts()
    answer = call(url, "POST", "/policies/choose/act?outputs=action,limited", {"observation": [[0, 9, 1], [5, 0, 0]]})
    assert answer == {"action": [2, 0], "limited": [int(Reason.BOUNDS), 0]}
    assert call(url, "POST", "/policies/choose/act", {"observation": [0.0, 9.0, 1.0]}) == {"action": 2}
    after = counts()
    assert set(after) == {"bounds", "change", "not_finite", "state"}
    assert after["bounds"] - before.get("bounds", 0) == 2
    with urllib3.PoolManager() as http:
        text = http.request("GET", url + "/metrics").data.decode()
    assert 'actserve_limited_total{policy="choose",reason="bounds",version="1"} 2.0' in text
    described = call(url, "GET", "/policies/arm")
    assert described["limits"]["outputs"][0]["high"] == [1, 1]
    assert described["manifest"]["signature"]["limits"] == described["limits"]


def test_both_programs_keep_to_the_limits_and_so_does_one_that_is_compiled_later(tmp_path: Path) -> None:
    done = export(source_of(policies.gaussian_noise), "explores", tmp_path, limits=EXPLORES, fuzzed=FUZZED).artifact
    programs = done.manifest.certificate["limits"]["programs"]
    assert set(programs) == {"onnx", "pt2"}
    portable = ModelStore(tmp_path / "other")
    files = {name: done.folder / name for name in done.manifest.files if not name.endswith(".pt2")}
    alone = {"onnx": done.manifest.programs["onnx"]}
    without = {**done.manifest.certificate, "limits": {"programs": {"onnx": programs["onnx"]}}}
    compiled = compile_artifact(
        portable.publish(replace(done.manifest, programs=alone, certificate=without), files), portable
    )
    assert compiled.manifest.certificate["limits"]["programs"]["pt2"]["outside"] == 0


def test_a_program_in_int8_keeps_to_the_limits(tmp_path: Path) -> None:
    (tmp_path / "chooses.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef chooser():\n    torch.manual_seed(0)\n"
        "    layers = nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)\n"
        "    return nn.Sequential(*layers), torch.zeros(8)\n"
    )
    (tmp_path / "limits.yaml").write_text("action: {forbidden: [1], dwell: 2, fallback: 0}\n")
    options = (
        "--action",
        "argmax",
        "--runtime",
        "onnx",
        "--store",
        "store",
        "--limits",
        "limits.yaml",
        "--fuzz",
        "512",
    )
    done = actserve("export", "chooses:chooser", *options, "--int8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = ModelStore(tmp_path / "store").resolve("chooser-int8", 1).manifest
    assert manifest.signature.limits is not None
    found = manifest.certificate["limits"]["programs"]["onnx"]
    assert found["outside"] == 0
    assert found["inputs"] > 0
