"""`actserve replay` and `actserve record show`: a recording of the whole service, and versions that act otherwise."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from actserve.core.errors import UsageError
from actserve.core.settings import Settings
from actserve.recording.reader import Recording
from actserve.recording.replay import Player, ProgramActor
from actserve.server.app import create_app
from actserve.store.local import ModelStore
from tests.asgi import Caller
from tests.command_line import ROOT, actserve
from tests.fake_policy import NAME, SIGNATURE, DigestRuntime
from tests.recorded import recorded_remote
from tests.shipped import SHIPPED
from tests.stream_service import running
from tests.variants import Variants

LSTM = "pong-lstm"
STEPS = 8


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    """Two versions of pong-lstm with other actions for the same observations."""
    made = Variants(ModelStore(SHIPPED).resolve(LSTM), ModelStore(tmp_path_factory.mktemp("store")))
    for _ in range(2):
        made.publish()
    return made


@pytest.fixture(scope="module")
def recorded(variants: Variants, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sessions side by side on version 2, and stateless requests."""
    folder = tmp_path_factory.mktemp("recorded") / "recording"
    settings = Settings(store=str(variants.store.root), record=folder, runtime="onnx", record_cpu=1.0)
    app = create_app(settings)
    with Caller(app) as call:
        call.wait(lambda: app.state.registry.not_ready() is None)
        begun = [call("POST", f"/policies/{LSTM}/sessions", {}).document["session"] for _ in range(2)]
        for number in range(STEPS):
            for shift, session in enumerate(begun):
                body = variants.observations[number + shift].tobytes()
                headers = {"Content-Type": "application/octet-stream", "X-Session": session}
                assert call("POST", f"/policies/{LSTM}/act", body, headers).status == 200
        body = variants.observations[0].tobytes()
        assert call("POST", "/act", body, {"Content-Type": "application/octet-stream"}).status == 200
        described = call("GET", "/policies").document["recording"]
        assert described == {"stopped": None, "recorded": 2 * STEPS + 1, "dropped": 0}
        metrics = call("GET", "/metrics").content.decode()
        labels = f'outcome="recorded",policy="{LSTM}",version="2"'
        assert f"actserve_recording_steps_total{{{labels}}} {2 * STEPS + 1}" in metrics.replace(".0\n", "\n")
        assert "actserve_recording_stopped{" not in metrics
        shown = re.findall(r"# TYPE (actserve_recording_\w+)", metrics)
        told = re.findall(r"^\| `(actserve_recording_\w+)`", (ROOT / "docs" / "recording.md").read_text(), re.MULTILINE)
        assert sorted(shown) == sorted(told)
    return folder


def test_the_same_version_acts_the_same(recorded: Path, variants: Variants) -> None:
    done = actserve("replay", str(recorded), "--policy", f"{LSTM}@2", "--store", str(variants.store.root), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    steps = 2 * STEPS + 1
    assert (found["policy"], found["runtime"], found["first"]) == (f"{LSTM}@2", "onnx", None)
    assert (found["steps"], found["same"], found["identical"], found["skipped"]) == (steps, steps, steps, 0)


def test_another_version_diverges_at_the_first_step(recorded: Path, variants: Variants, tmp_path: Path) -> None:
    """It acts as version 2, less one: its scores, and so the leads, are the same."""
    saved = tmp_path / "step.safetensors"
    options = ("--policy", f"{LSTM}@1", "--store", str(variants.store.root), "--save", str(saved))
    done = actserve("replay", str(recorded), *options, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["same"], found["saved"]) == (1, 0, str(saved))
    first = found["first"]
    assert (first["step"], first["version"]) == (1, 2)
    assert first["actions"] == [variants.action(a, 2) for a in variants.episode(1)] + [
        variants.action(a, 1) for a in variants.episode(1)
    ]
    assert first["leads"][0] == first["leads"][1] > 0
    tensors = load_file(saved)
    assert np.array_equal(tensors["observation.pixels"], variants.observations[0])
    assert [int(tensors[f"{side}.action"]) for side in ("recorded", "replayed")] == first["actions"]
    text = actserve("replay", str(recorded), *options[:4]).stdout
    assert "the same action in 0 of 17 steps (0.00%)" in text
    assert "to see it: actserve replay" in text.replace("\n", " ")


def test_at_its_own_rate_it_acts_the_same(recorded: Path, variants: Variants) -> None:
    done = actserve("replay", str(recorded), "--rate", "own", "--store", str(variants.store.root), "--json")
    assert (done.returncode, json.loads(done.stdout)["identical"]) == (0, 2 * STEPS + 1)


def test_show_lists_what_there_is(recorded: Path) -> None:
    (found,) = json.loads(actserve("record", "show", str(recorded), "--json").stdout)["policies"]
    assert (found["policy"], found["version"], found["episodes"], found["steps"]) == (LSTM, 2, 3, 2 * STEPS + 1)
    assert found["doors"] == {"session": 2 * STEPS, "act": 1}
    assert LSTM in actserve("record", "show", str(recorded)).stdout


def test_a_service_is_replayed_against_a_recording(tmp_path: Path) -> None:
    with recorded_remote(tmp_path) as (_, policy):
        for seed in range(3):
            with policy.session(seed=seed, exploration="random") as session:
                for x in range(STEPS):
                    session.act(np.array(x))
        policy.step({"x": np.arange(3)}, exploration="random")
    with running() as service:
        done = actserve("replay", str(tmp_path), "--url", service.url, "--json")
        found = json.loads(done.stdout)
        assert (done.returncode, found["identical"], found["policy"]) == (0, 3 * STEPS + 3, f"{NAME}@1")
        refused = actserve("replay", str(tmp_path), "--url", service.url, "--policy", f"{NAME}@7")
        assert (refused.returncode, "acts with digest@1; expected 7" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--policy", "chess"), "expected a policy of the recording, pong-lstm; got 'chess'"),
        (("--policy", "pong-lstm@x"), "with a whole number as the version"),
        (("--recorded", "9"), "expected a recorded version of pong-lstm, [2]; got 9"),
        (("--policy", "pong-lstm@9"), "pong-lstm has no version"),
    ],
)
def test_what_there_is_not_is_named(recorded: Path, variants: Variants, options: tuple[str, ...], said: str) -> None:
    done = actserve("replay", str(recorded), "--store", str(variants.store.root), *options)
    assert done.returncode != 0
    assert said in done.stderr.replace("\n", " ")


def test_of_several_policies_one_must_be_named(recorded: Path, tmp_path: Path) -> None:
    with recorded_remote(tmp_path) as (_, policy):
        policy.act(np.array(1))
    for path in recorded.iterdir():
        shutil.copy(path, tmp_path)
    done = actserve("replay", str(tmp_path))
    assert done.returncode == 2
    assert "expected --policy, one of digest, pong-lstm" in done.stderr.replace("\n", " ")


def test_a_version_with_other_observations_is_refused(tmp_path: Path, recorded: Path) -> None:
    signature = Recording(recorded).of(LSTM).signature
    with pytest.raises(UsageError, match="expected a policy that takes what was recorded"):
        Player(ProgramActor(SIGNATURE, DigestRuntime(1).run), signature)


def test_two_versions_are_compared_on_a_recording(recorded: Path, variants: Variants) -> None:
    options = ("--store", str(variants.store.root), "--recording", str(recorded))
    steps = 2 * STEPS + 1
    for before, after, same in ((2, 2, steps), (2, 1, 0)):
        done = actserve("diff", f"{LSTM}@{before}", f"{LSTM}@{after}", *options, "--json")
        found = json.loads(done.stdout)["agreement"]
        assert (done.returncode, found["samples"], found["same"], found["of"]) == (0, steps, same, "recorded steps")
        assert found["largest_difference"] == {"action_value": 0.0}
    assert f"0 of {steps} recorded steps" in actserve("diff", f"{LSTM}@2", f"{LSTM}@1", *options).stdout


def test_a_canary_is_held_against_a_recording(recorded: Path, variants: Variants) -> None:
    """Version 1 never acts as version 2, which was recorded."""
    store = ("--store", str(variants.store.root))
    options = (*store, "--recording", str(recorded), "--at-least", "0.99")
    done = actserve("canary", LSTM, "1", *options)
    text = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert f"{LSTM}@1 (.onnx): the same action in 0 of {2 * STEPS + 1} steps (0.00%)" in text
    assert "first at step 1 of episode" in text
    assert f"to see it: actserve replay {recorded} --policy {LSTM}@1 {' '.join(store)} --save" in text
    assert f"{LSTM}@1 gets no requests: expected the same action in at least 99.00% of the steps" in text
    refused = json.loads(actserve("canary", LSTM, "1", *options, "--json").stdout)
    assert (refused["refused"], refused["replayed"]["same"], "canary" in refused) == (True, 0, False)
    assert json.loads(actserve("pin", LSTM, *store, "--json").stdout)["canary"] is None
    taken = json.loads(actserve("canary", LSTM, "2", *options, "--share", "0.2", "--json").stdout)
    assert (taken["canary"], taken["replayed"]["same"]) == ({"version": 2, "share": 0.2}, 2 * STEPS + 1)
    # Without a threshold it is only shown.
    shown = actserve("canary", LSTM, "1", *options[:4])
    assert (shown.returncode, "version 1 answers 10% of the requests" in shown.stdout) == (0, True)
    actserve("canary", LSTM, *store)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("1", "--at-least", "0.5"), "--at-least is for a recording: add --recording DIR"),
        (("--recording", "somewhere"), "--recording is for a version"),
        (("1", "--recording", "nowhere"), "expected a folder with a recording"),
    ],
)
def test_a_canary_without_what_it_needs_is_refused(variants: Variants, options: tuple[str, ...], said: str) -> None:
    done = actserve("canary", LSTM, *options, "--store", str(variants.store.root))
    assert (done.returncode, said in " ".join(done.stderr.split())) == (2, True)
