"""The replay counts how often limits act, for the version that was recorded and for the one that is replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actserve.core.settings import Settings
from actserve.server.app import create_app
from actserve.store import routing
from actserve.store.local import ModelStore
from actserve_export import export
from tests.asgi import Caller
from tests.command_line import actserve
from tests.exported import made_once
from tests.test_action_limits import FUZZED, follow

NAME = "arm"
SEEN = [0.0, 0.25, 2.0, np.inf, 0.0, -0.75]
# Version 1 recorded them: 0, 0.25, 0.75 (the change), 0.75 (held), 0.25 (the change), -0.25 (the change).
NARROW = {"action": {"low": -1, "high": 1, "change": 0.5, "fallback": "hold"}}
# Version 2: 0, 0.25, 1 (the bounds), 1 (held), 0, -0.75.
WIDE = {"action": {"low": -1, "high": 1, "fallback": "hold"}}
NONE = {"bounds": 0, "change": 0, "not_finite": 0, "state": 0}


@pytest.fixture(scope="module")
def store() -> ModelStore:
    """A policy whose action is its observation, with narrow limits, wide ones, and none."""

    def make(folder: Path) -> None:
        for limits in (NARROW, WIDE, None):
            export(follow((1,)), NAME, folder, runtimes=["onnx"], limits=limits, fuzzed=FUZZED if limits else None)
        routing.pin(ModelStore(folder), NAME, 1)

    return ModelStore(made_once("narrow-and-wide", make, [Path(__file__)]))


@pytest.fixture(scope="module")
def recorded(store: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "recording"
    app = create_app(Settings(store=str(store.root), record=folder, runtime="onnx", record_cpu=1.0))
    with Caller(app) as call:
        call.wait(lambda: app.state.registry.not_ready() is None)
        session = call("POST", f"/policies/{NAME}/sessions", {}).document["session"]
        for value in SEEN:
            headers = {"Content-Type": "application/octet-stream", "X-Session": session}
            assert call("POST", f"/policies/{NAME}/act", np.float32(value).tobytes(), headers).status == 200
    return folder


def limits_of(recorded: Path, store: ModelStore, version: int) -> Any:
    done = actserve("replay", str(recorded), "--policy", f"{NAME}@{version}", "--store", str(store.root), "--json")
    return json.loads(done.stdout)["limits"]


def test_both_versions_are_counted(recorded: Path, store: ModelStore) -> None:
    narrow = NONE | {"steps": 6, "limited": 4, "bounds": 1, "change": 3, "not_finite": 1}
    wide = NONE | {"steps": 6, "limited": 2, "bounds": 1, "not_finite": 1}
    assert limits_of(recorded, store, 1) == {"recorded": narrow, "replayed": narrow}
    assert limits_of(recorded, store, 2) == {"recorded": narrow, "replayed": wide}
    assert limits_of(recorded, store, 3) == {"recorded": narrow, "replayed": None}


def test_they_are_shown(recorded: Path, store: ModelStore) -> None:
    options = ("--policy", f"{NAME}@2", "--store", str(store.root))
    shown = " ".join(actserve("replay", str(recorded), *options).stdout.split())
    assert "recorded: limits acted in 4 of 6 steps (bounds 1, change 3, not_finite 1)" in shown
    assert "replayed: limits acted in 2 of 6 steps (bounds 1, not_finite 1)" in shown
