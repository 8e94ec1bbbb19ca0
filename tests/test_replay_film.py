"""`actserve replay --film`: the screens of an episode, beside what the version does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from actserve.cli.tools.replay import replay
from actserve.cli.tools.replay_film import Filming
from actserve.core.errors import UsageError
from actserve.core.signature import Array, Arrays, TensorSpec
from actserve.recording.reader import Recording, Steps
from actserve.recording.replay import ProgramActor
from actserve.store.artifact import Artifact, Manifest
from tests.command_line import actserve
from tests.recorded import recording
from tests.recorded_episodes import NAME, ROBOT, record_episodes
from tests.test_replay import LSTM, STEPS
from tests.test_replay import recorded as recorded  # a fixture: two sessions and a request, on version 2
from tests.test_replay import variants as variants  # a fixture
from tests.variants import Variants

CAMERAS = replace(ROBOT, observations=ROBOT.observations[:3])


def frames(path: Path) -> list[Array]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_game_is_filmed_with_the_recorded_screens(recorded: Path, variants: Variants, tmp_path: Path) -> None:
    """Version 1 never acts as version 2, which was recorded: the first episode diverges."""
    film = tmp_path / "game.gif"
    options = ("--policy", f"{LSTM}@1", "--store", str(variants.store.root), "--film", str(film))
    found = json.loads(actserve("replay", str(recorded), *options, "--json").stdout)
    assert found["film"] == {"file": str(film), "episode": found["first"]["episode"], "steps": STEPS}
    shown = frames(film)
    assert len(shown) == STEPS
    for number, frame in enumerate(shown):
        screen = variants.observations[number]
        enlarged = screen.repeat(3, axis=0).repeat(3, axis=1)
        np.testing.assert_array_equal(frame[: len(enlarged), : enlarged.shape[1]], enlarged)
    text = actserve("replay", str(recorded), *options, "--speed", "4").stdout
    assert f"{film}: 3 steps of episode {found['first']['episode']}" in text.replace("\n", " ").replace("  ", " ")
    assert len(frames(film)) == 3  # 1, 5, and the last


def test_where_an_action_differs_the_film_says_so(recorded: Path, variants: Variants, tmp_path: Path) -> None:
    films = []
    for version in (1, 2):
        film = tmp_path / f"{version}.gif"
        options = ("--policy", f"{LSTM}@{version}", "--store", str(variants.store.root), "--film", str(film))
        actserve("replay", str(recorded), *options, "--episode", episode_of(recorded))
        films.append(frames(film))
    note = np.s_[48:70, 490:]  # the line below the name of the game
    assert not np.array_equal(films[0][0][note], films[1][0][note])


def episode_of(recorded: Path) -> str:
    (steps,) = Recording(recorded).of(LSTM).windows(1 << 30)
    return steps[0].episode


def act(inputs: Arrays) -> Arrays:
    size = len(inputs["observation_state"])
    return {spec.name: spec.zeros(size) for spec in CAMERAS.outputs}


def film_of(steps: Steps, path: Path, episode: str | None = None) -> int:
    actor = ProgramActor(steps.signature, act)
    found = replay(steps, actor, f"{NAME}@1", "onnx", "full", lambda count: None)
    return int(Filming(path, actor).film(steps, found, episode, lambda count: None)["steps"])


def test_cameras_are_side_by_side(tmp_path: Path) -> None:
    lengths = (2, 4)
    episodes = record_episodes(tmp_path, CAMERAS, lengths=lengths)
    steps = Recording(tmp_path).of(NAME)
    names = list(dict.fromkeys(step.episode for window in steps.windows(1 << 30) for step in window))
    for name, length, episode in zip(names, lengths, episodes, strict=True):
        assert film_of(steps, tmp_path / "cameras.gif", name) == length
        shown = frames(tmp_path / "cameras.gif")
        assert len(shown) == length
        # 12 rows are enlarged to 240. There are more colours than a GIF has, so they are nearly the same.
        left = shown[0][::20, ::20][:, :16].astype(int)
        assert np.abs(left - episode.steps[0]["observation_images_top"][0]).mean() < 40
        assert shown[0].shape == (240, 600, 3)
        assert not shown[0][200:, 320:].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--film", "film.avi"), "expected a video file ending in .mp4 or .gif; got 'film.avi'"),
        (("--film", "nowhere/film.gif"), "there is no folder nowhere"),
        (("--episode", "one"), "--episode and --speed are for a film"),
        (("--film", "film.gif", "--episode", "one"), "expected an episode of the recording"),
    ],
)
def test_what_cannot_be_filmed_is_refused(
    recorded: Path, variants: Variants, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    given = ("--policy", f"{LSTM}@2", "--store", str(variants.store.root), *options)
    done = actserve("replay", str(recorded), *given, cwd=tmp_path)
    assert (done.returncode, said in " ".join(done.stderr.split())) == (2, True), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_policy_without_images_is_refused(tmp_path: Path) -> None:
    blind = replace(ROBOT, observations=(TensorSpec("x", "float32", (5,)),))
    with pytest.raises(
        UsageError, match=r"expected a policy that sees images, for a film; this one sees x: float32\[5\]"
    ):
        Filming(tmp_path / "film.gif", ProgramActor(blind, act))


def test_an_episode_of_several_workers_is_refused(tmp_path: Path) -> None:
    """A session, whose steps two workers took in turn."""
    manifest = Manifest(1, NAME, 1, None, "", CAMERAS, None, {}, {}, {}, {})
    for number in (1, 2):
        with recording(tmp_path) as recorder:
            session = recorder.of(Artifact(Path("nowhere"), manifest), "onnx").session("an id", "session", None)
            assert session is not None
            step = session.step(number)
            inputs = {spec.name: spec.zeros(1) for spec in CAMERAS.inputs}
            step.capture(inputs, act(inputs), slice(0, 1), 1000)
            step.commit()
    with pytest.raises(UsageError, match="several workers took the steps"):
        film_of(Recording(tmp_path).of(NAME), tmp_path / "film.gif")
    assert not (tmp_path / "film.gif").exists()
