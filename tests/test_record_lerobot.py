"""`actserve record export --format lerobot`, read by LeRobot's own class in `.venv/lerobot`, and by pandas."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actserve.core.robot import Robot
from actserve.core.signature import Arrays, Chunk, TensorSpec
from actserve.recording.rate import steps_per_second
from actserve.recording.reader import Recording
from actserve_export.recordings.as_lerobot import Frames
from tests.command_line import ROOT, actserve
from tests.recorded_episodes import NAME, PERIOD_S, ROBOT, Recorded, record_episodes

PYTHON = ROOT / ".venv" / "lerobot" / "bin" / "python"
LENGTHS = (4, 1, 3)  # the one step is no trajectory
needs_lerobot = pytest.mark.skipif(not PYTHON.exists(), reason="not installed: make .venv/lerobot/installed")


@dataclass(frozen=True)
class Exported:
    episodes: list[Recorded]  # in the order of the dataset
    frames: Arrays
    said: Any
    printed: str


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("lerobot")
    robot = Robot(joints=("gripper",), control_period_s=0.1)
    first, _, last = record_episodes(folder / "recording", lengths=LENGTHS, environment=robot)
    names = ("recording", "dataset", "frames.npz")
    path = os.pathsep.join(map(str, (ROOT / "app", ROOT / "exporters", ROOT)))
    done = subprocess.run(
        [str(PYTHON), "-m", "tests.lerobot_dataset", *(str(folder / name) for name in names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed, said = done.stdout.splitlines()
    # Trajectories come when they are complete: the shorter one first.
    return Exported([last, first], dict(np.load(folder / "frames.npz")), json.loads(said), printed)


@needs_lerobot
def test_lerobot_reads_every_frame(exported: Exported) -> None:
    frames, steps = exported.frames, [step for episode in exported.episodes for step in episode.steps]
    top = np.concatenate([step["observation_images_top"] for step in steps])
    wrist = np.concatenate([step["observation_images_wrist"] for step in steps])
    np.testing.assert_array_equal(np.rint(frames["observation.images.top"] * 255), np.moveaxis(top, -1, 1))
    np.testing.assert_allclose(frames["observation.images.wrist"], wrist, atol=0.5 / 255 + 1e-6)
    for name, column in (("observation.state", "observation_state"), ("observation.gripper", "gripper")):
        expected = np.concatenate([step[column] for step in steps]).astype(np.float32)
        np.testing.assert_array_equal(frames[name], expected)
    np.testing.assert_array_equal(frames["action"], np.concatenate([step["action"][:, 0] for step in steps]))
    assert frames["action"].dtype == frames["observation.state"].dtype == np.float32
    assert frames["next.reward"].tolist() == [reward for episode in exported.episodes for reward in episode.rewards]
    assert frames["next.done"].tolist() == [False] * 6 + [True]
    assert frames["episode_index"].tolist() == [0] * 3 + [1] * 4
    np.testing.assert_allclose(frames["timestamp"], [0, 0.1, 0.2, 0, 0.1, 0.2, 0.3], atol=1e-6)
    assert set(frames["task"]) == {NAME}


@needs_lerobot
def test_the_dataset_says_what_it_is(exported: Exported) -> None:
    assert exported.printed.startswith("2 trajectories of 8 steps")
    assert (exported.said["fps"], exported.said["episodes"]) == (10, 2)
    features = exported.said["features"]
    assert features["action"] == {"dtype": "float32", "shape": [1], "names": ["gripper"]}
    assert features["observation.images.top"]["shape"] == [12, 16, 3]
    assert features["observation.images.wrist"]["shape"] == [10, 14, 3]


@needs_lerobot
def test_pandas_reads_the_dataset_and_the_recording(exported: Exported) -> None:
    assert exported.said["actions"] == exported.frames["action"].tolist()
    assert set(exported.said["actions"]) < set(exported.said["recorded actions"])
    assert len(exported.said["recorded actions"]) == sum(LENGTHS)


def test_without_rewards_there_are_none() -> None:
    assert not Frames(ROBOT, (), rewards=False).features.keys() & {"next.reward", "next.done"}


def test_observations_with_the_same_short_name_keep_theirs() -> None:
    pair = (TensorSpec("observation_x", "float32", (2,)), TensorSpec("x", "float32", (2,)))
    features = Frames(replace(ROBOT, observations=pair), (), rewards=False).features
    assert list(features) == ["observation.observation_x", "observation.x", "action"]
    alone = Frames(replace(ROBOT, observations=pair[1:]), (), rewards=False).features
    assert list(alone) == ["observation.state", "action"]


def refused(folder: Path) -> str:
    done = actserve("record", "export", str(folder), str(folder / "out"), "--format", "lerobot")
    assert done.returncode == 2
    return " ".join(done.stderr.split())


def test_what_cannot_be_a_dataset_is_refused(tmp_path: Path) -> None:
    record_episodes(tmp_path / "alone", lengths=(1, 1))
    assert "expected steps that follow one another" in refused(tmp_path / "alone")
    plan = TensorSpec("action", "float32", (4, 2))
    planned = replace(ROBOT, outputs=(plan,), chunk=Chunk("action", execute=2))
    record_episodes(tmp_path / "planned", signature=planned)
    assert "this one plans chunks, and is recorded when it runs" in refused(tmp_path / "planned")


def test_without_lerobot_the_error_says_where_to_run_it(tmp_path: Path) -> None:
    record_episodes(tmp_path)
    assert 'install "actserve[record]" in LeRobot\'s own environment' in refused(tmp_path)


def test_the_rate_is_that_of_the_steps_without_an_environment(tmp_path: Path) -> None:
    record_episodes(tmp_path, lengths=(6, 4))
    steps = Recording(tmp_path).of(NAME)
    assert steps_per_second(steps, steps.transitions()) == pytest.approx(1 / PERIOD_S)
