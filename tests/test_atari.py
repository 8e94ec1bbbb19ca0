from __future__ import annotations

import hashlib
import sys
from dataclasses import replace

import numpy as np
import pytest
from ale_py import Action as ALEAction
from ale_py import AtariEnv

from actserve.atari.emulator import AtariGame
from actserve.core.environment import Environment, GameAction
from actserve.core.errors import EnvironmentMismatch, UsageError
from actserve.core.signature import Array

ACTIONS = ("NOOP", 0), ("FIRE", 1), ("RIGHT", 3), ("LEFT", 4), ("RIGHTFIRE", 11), ("LEFTFIRE", 12)
PONG = Environment("ALE/Pong-v5", "pong", "pixels", tuple(GameAction(*action) for action in ACTIONS))
RIGHT, LEFT = 2, 3
PADDLE = (92, 186, 92)  # the policy's, on the right


def frames_hash(seed: int, environment: Environment = PONG, steps: int = 60) -> str:
    game, digest = AtariGame(environment, seed), hashlib.sha256()
    for step in range(steps):
        digest.update(game.screen().tobytes())
        game.act(step // 2 % 6)
    return digest.hexdigest()


def paddle_row(screen: Array) -> float:
    """The mean row of the green paddle."""
    rows, _ = np.nonzero((screen == PADDLE).all(2))
    assert len(rows), "no paddle on the screen"
    return float(rows.mean())


def test_the_screen_is_rgb_in_one_buffer() -> None:
    game = AtariGame(PONG, 0)
    first = game.screen()
    assert first.shape == (210, 160, 3)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    before = first.copy()
    for _ in range(20):
        game.act(RIGHT)
    assert game.screen() is first
    assert (first != before).any()


def test_a_game_counts_and_ends() -> None:
    game = AtariGame(replace(PONG, max_frames=400), 0)
    rewards = 0.0
    while not game.over:
        rewards += game.act(0)
    assert game.steps == 100
    assert game.frames == pytest.approx(400, abs=4)
    assert game.score == rewards < 0  # who does nothing, loses


@pytest.mark.parametrize(("action", "direction"), [(RIGHT, -1), (LEFT, 1)])
def test_an_action_does_what_its_meaning_says(action: int, direction: int) -> None:
    game = AtariGame(PONG, 0)
    for _ in range(20):  # until the paddles are there
        game.act(0)
    before = paddle_row(game.screen())
    for _ in range(4):
        game.act(action)
    assert direction * (paddle_row(game.screen()) - before) > 10  # RIGHT is up in Pong


def test_a_seed_is_a_game() -> None:
    assert frames_hash(3) == frames_hash(3)
    assert len({frames_hash(seed) for seed in range(4)}) == 4
    sure = replace(PONG, repeat_action_probability=0.0)  # nothing else is random in Pong
    assert len({frames_hash(seed, sure) for seed in range(4)}) == 1


def test_it_is_the_game_that_gymnasium_plays_with_the_seed() -> None:
    env = AtariEnv("pong", obs_type="rgb", frameskip=4, repeat_action_probability=0.25)
    for seed in (0, 5):
        observation, _ = env.reset(seed=seed)
        game = AtariGame(PONG, seed)
        for step in range(300):
            np.testing.assert_array_equal(game.screen(), observation)
            action = step * step % 6
            observation, reward, *_ = env.step(action)
            assert game.act(action) == reward
    env.close()


@pytest.mark.parametrize(
    "actions",
    [
        tuple(GameAction(meaning, code) for code, (meaning, _) in enumerate(ACTIONS)),  # indices taken for codes
        tuple(GameAction(meaning, code) for (_, code), (meaning, _) in zip(ACTIONS, ACTIONS[::-1], strict=True)),
        PONG.actions[:5],
        (),
    ],
)
def test_other_actions_than_the_games_are_refused(actions: tuple[GameAction, ...]) -> None:
    with pytest.raises(EnvironmentMismatch) as error:
        AtariGame(replace(PONG, actions=actions), 0)
    assert "NOOP(0), FIRE(1), RIGHT(3), LEFT(4), RIGHTFIRE(11), LEFTFIRE(12)" in error.value.message
    assert ", ".join(f"{action.meaning}({action.code})" for action in actions) in error.value.message


def test_all_eighteen_actions_are_an_action_set_too() -> None:
    meanings = [action.name for action in ALEAction.__members__.values()]
    every = tuple(GameAction(meaning, code) for code, meaning in enumerate(meanings[:18]))
    full, minimal = AtariGame(replace(PONG, actions=every), 0), AtariGame(PONG, 0)
    for action in (3, 3, 4, 0):
        full.act(action)
        minimal.act([code for _, code in ACTIONS].index(action))
        assert np.array_equal(full.screen(), minimal.screen())


@pytest.mark.parametrize("index", [-1, 6, 11])
def test_an_action_that_is_none_is_refused(index: int) -> None:
    game = AtariGame(PONG, 0)
    with pytest.raises(EnvironmentMismatch, match=rf"from 0 to 5 \(NOOP.*got {index}"):
        game.act(index)
    assert game.steps == 0


@pytest.mark.parametrize(
    ("game", "hint"), [("pongg", "pong"), ("Breakout", "breakout"), ("spaceinvaders", "space_invaders"), ("", "pong")]
)
def test_an_unknown_game_gets_a_hint(game: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        AtariGame(replace(PONG, game=game), 0)


def test_a_seed_below_zero_would_be_the_time_to_ale() -> None:
    with pytest.raises(UsageError, match="expected a seed of 0 or more; got -1"):
        AtariGame(PONG, -1)


def test_without_ale_py_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(UsageError, match=r'pip install "actserve\[play\]"'):
        AtariGame(PONG, 0)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    AtariGame(PONG, 0).act(0)
    assert capfd.readouterr() == ("", "")
