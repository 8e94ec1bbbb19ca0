"""`actserve record export`: what other projects' libraries read of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, ReplayBuffer, TensorStorage

from tests.command_line import actserve
from tests.fake_policy import NAME, Alone, seen
from tests.recorded import recorded_remote

STEPS = 5
TRAJECTORIES = 3  # the last one is not done


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sessions side by side. Step k of session s sees 10 * s + k, and its reward is that number."""
    folder = tmp_path_factory.mktemp("recorded")
    with recorded_remote(folder) as (_, policy):
        sessions = [policy.session(seed=seed) for seed in range(TRAJECTORIES)]
        for k in range(STEPS):
            for s, session in enumerate(sessions):
                session.act(np.array(10 * s + k))
                session.tell(reward=10 * s + k, done=k == STEPS - 1 and s < TRAJECTORIES - 1)
        for session in sessions:
            session.end()
    return folder


@pytest.fixture(scope="module")
def exported(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "transitions"
    done = actserve("record", "export", str(recorded), str(out), "--format", "torchrl", "--json")
    assert json.loads(done.stdout)["transitions"] == TRAJECTORIES * STEPS - 1
    assert json.loads(done.stdout)["rewards"] is True
    return out


@pytest.mark.parametrize("storage", [LazyMemmapStorage, TensorStorage])
def test_torchrl_has_every_transition(exported: Path, storage: type) -> None:
    data = TensorDict.load_memmap(exported)
    if storage is TensorStorage:
        buffer = ReplayBuffer(storage=TensorStorage(data))
    else:
        buffer = ReplayBuffer(storage=LazyMemmapStorage(len(data)))
        buffer.extend(data)
    found = buffer[:]
    # Without the last step of the last trajectory: nobody knows what came after it.
    expected = [10 * s + k for s in range(TRAJECTORIES) for k in range(STEPS)][:-1]
    order = sorted(range(len(found)), key=lambda place: int(found["x"][place]))
    found = found[order]
    assert found["x"].tolist() == expected
    lasts = [x % 10 == STEPS - 1 for x in expected]
    assert found["next", "x"].tolist() == [x if last else x + 1 for x, last in zip(expected, lasts, strict=True)]
    assert found["next", "reward"][:, 0].tolist() == expected
    assert found["next", "done"][:, 0].tolist() == found["next", "terminated"][:, 0].tolist() == lasts
    assert found["is_init"][:, 0].tolist() == [x % 10 == 0 for x in expected]
    assert found["step"].tolist() == [x % 10 + 1 for x in expected]
    trajectories = found["collector", "traj_ids"].tolist()
    assert trajectories == [trajectories[x // 10 * STEPS] for x in expected]
    assert len(set(trajectories)) == TRAJECTORIES
    for s in range(TRAJECTORIES):
        alone = Alone(1, s, None)
        mine = found[[x // 10 == s for x in found["x"].tolist()]]
        for k, (action, value) in enumerate(zip(mine["action"].tolist(), mine["value"].tolist(), strict=True)):
            outputs = alone.take(seen(10 * s + k))
            assert (action, value) == (outputs["action"].item(), outputs["value"][0].tolist())


def test_safetensors_has_a_file_for_each_trajectory(recorded: Path, tmp_path: Path) -> None:
    done = actserve("record", "export", str(recorded), str(tmp_path / "out"), "--format", "safetensors")
    assert f"{TRAJECTORIES} trajectories of {TRAJECTORIES * STEPS} steps" in done.stdout
    found = [load_file(path) for path in sorted((tmp_path / "out").iterdir())]
    assert sorted(each["observation.x"].tolist() for each in found) == [
        [10 * s + k for k in range(STEPS)] for s in range(TRAJECTORIES)
    ]
    for each in found:
        assert each["reward"].tolist() == each["observation.x"].tolist()
        assert each["done"].tolist() == [False] * (STEPS - 1) + [bool(each["observation.x"][0] < 20)]
        assert each["output.value"].shape == (STEPS, 2)


def test_show_says_what_an_episode_earned(recorded: Path, tmp_path: Path) -> None:
    (shown,) = json.loads(actserve("record", "show", str(recorded), "--json").stdout)["policies"]
    sums = [sum(10 * s + k for k in range(STEPS)) for s in range(TRAJECTORIES)]
    assert shown["reward"] == sum(sums) / TRAJECTORIES
    assert f" {shown['reward']:g} " in actserve("record", "show", str(recorded)).stdout
    with recorded_remote(tmp_path) as (_, policy):
        policy.act(np.array(1))
    (unknown,) = json.loads(actserve("record", "show", str(tmp_path), "--json").stdout)["policies"]
    assert unknown["reward"] is None


def test_a_folder_with_files_is_left_as_it_is(recorded: Path) -> None:
    done = actserve("record", "export", str(recorded), str(recorded), "--format", "torchrl")
    assert (done.returncode, "expected a new or empty folder" in done.stderr) == (2, True)


@pytest.mark.parametrize("format_", ["torchrl", "safetensors"])
def test_without_rewards_the_export_says_so(tmp_path: Path, format_: str) -> None:
    with recorded_remote(tmp_path / "recording") as (_, policy), policy.session() as session:
        for x in range(3):
            session.act(np.array(x))
    options = ("record", "export", str(tmp_path / "recording"))
    done = actserve(*options, str(tmp_path / "text"), "--format", format_)
    assert done.stdout.rstrip().endswith("; no reward is known")
    assert (
        json.loads(actserve(*options, str(tmp_path / "json"), "--format", format_, "--json").stdout)["rewards"] is False
    )


def test_requests_alone_are_no_transitions(tmp_path: Path) -> None:
    with recorded_remote(tmp_path / "recording") as (_, policy):
        policy.act(np.array([1, 2, 3]))
    options = (str(tmp_path / "recording"), str(tmp_path / "out"), "--format", "torchrl", "--policy", NAME)
    done = actserve("record", "export", *options)
    assert (done.returncode, "expected steps that follow one another" in done.stderr) == (2, True)
