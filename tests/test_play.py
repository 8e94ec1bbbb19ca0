from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from actserve.atari.emulator import AtariGame
from actserve.atari.play import Report, play
from actserve.core.errors import EnvironmentMismatch
from actserve.core.signature import Array
from tests.test_atari import PONG, RIGHT

SHORT = replace(PONG, max_frames=240)


def look(screen: Array) -> int:
    """An action that depends on every pixel."""
    return int(screen.sum()) % 6


def test_games_are_played_to_their_end() -> None:
    report = play(lambda _seed: lambda _screen: RIGHT, SHORT, episodes=2, seed=5)
    assert [episode.seed for episode in report.episodes] == [5, 6]
    assert [episode.steps for episode in report.episodes] == [60, 60]
    assert report.steps == 120
    assert report.episodes[0].actions_sha256 == hashlib.sha256(bytes([RIGHT] * 60)).hexdigest()


def test_the_same_seed_is_the_same_game() -> None:
    one, again = (play(lambda _seed: look, PONG, episodes=2, seed=1, max_steps=200) for _ in range(2))
    assert one.episodes == again.episodes
    shifted = play(lambda _seed: look, PONG, episodes=1, seed=2, max_steps=200)
    assert shifted.episodes[0] == one.episodes[1]  # a game does not depend on those before it
    assert one.episodes[0].actions_sha256 != one.episodes[1].actions_sha256


def test_the_report_is_the_agreed_json() -> None:
    report = play(lambda _seed: np.int64, SHORT, episodes=0, seed=0)
    assert report.as_json() == {
        "policy": "",
        "runtime": "",
        "scores": [],
        "episodes": [],
        "latency_ms": {"p50": 0.0, "p90": 0.0, "p99": 0.0, "p999": 0.0},
    }
    report = play(lambda _seed: look, PONG, episodes=1, seed=0, policy="pong", runtime="onnx", max_steps=100)
    document = json.loads(json.dumps(report.as_json()))
    assert (document["policy"], document["runtime"]) == ("pong", "onnx")
    assert set(document["latency_ms"]) == {"p50", "p90", "p99", "p999"}
    (episode,) = document["episodes"]
    assert set(episode) == {"seed", "score", "steps", "actions_sha256"}
    assert document["scores"] == [episode["score"]]
    assert episode["steps"] == 100


def test_latency_is_that_of_the_policy_alone() -> None:
    def slow(_screen: Array) -> int:
        time.sleep(0.004)
        return 0

    report = play(lambda _seed: slow, PONG, episodes=1, seed=0, max_steps=5, on_step=lambda *_: time.sleep(0.3))
    assert 4 <= report.latency_ms["p50"] < 300
    assert 5 * 0.004 <= report.acting_s < 5 * 0.3


def test_every_step_is_shown() -> None:
    shown: list[tuple[int, int, int]] = []

    def show(number: int, game: AtariGame, action: int) -> None:
        shown.append((number, game.steps, action))

    play(lambda _seed: lambda _screen: RIGHT, SHORT, episodes=2, seed=0, max_steps=2, on_step=show)
    assert shown == [(0, 1, RIGHT), (0, 2, RIGHT), (1, 1, RIGHT), (1, 2, RIGHT)]


def test_every_game_has_a_player_of_its_own() -> None:
    begun: list[list[Array]] = []

    def begin(_seed: int) -> Callable[[Array], int]:
        mine: list[Array] = []
        begun.append(mine)

        def act(screen: Array) -> int:
            mine.append(screen)
            return 0

        return act

    play(begin, SHORT, episodes=2, seed=0, max_steps=3)
    assert [len(game) for game in begun] == [3, 3]


def test_any_kind_of_number_is_an_action() -> None:
    def played(kind: Callable[[int], object]) -> Report:
        return play(lambda _seed: lambda _screen: kind(2), SHORT, episodes=1, seed=0, max_steps=5)

    assert len({played(kind).episodes for kind in (int, np.int64, np.array)}) == 1


def test_an_action_that_the_game_lacks_ends_it() -> None:
    with pytest.raises(EnvironmentMismatch, match="got 6"):
        play(lambda _seed: lambda _screen: 6, SHORT, episodes=1, seed=0)


def test_the_game_is_at_hand_while_it_is_played() -> None:
    def check(_number: int, game: AtariGame, _action: int) -> None:
        assert game.screen().shape == (210, 160, 3)
        assert not game.over or game.steps == 60

    play(lambda _seed: look, SHORT, episodes=1, seed=0, on_step=check)
