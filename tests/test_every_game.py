"""Each game that comes with ale-py, as `actserve train` meets it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ale_py import roms

from actserve.atari.emulator import AtariGame
from actserve.core.errors import UsageError
from actserve_export.training.atari import environment, screen
from tests.test_atari import PONG

FOR_TWO = ("combat", "joust", "maze_craze", "warlords")
SOME = ("breakout", "carnival", "pacman", "pong", "tetris")  # screens of three sizes; the others are tried by test-wide


@pytest.mark.parametrize("game", FOR_TWO)
def test_a_game_for_two_is_refused_and_the_process_lives(game: str) -> None:
    with pytest.raises(UsageError, match="for two players"):
        AtariGame(replace(PONG, game=game), 0)
    with pytest.raises(UsageError, match="for two players"):
        environment(game)


@pytest.mark.parametrize(
    "game",
    [
        *SOME,
        *(pytest.param(game, marks=pytest.mark.wide) for game in sorted({*roms.get_all_rom_ids()} - {*FOR_TWO, *SOME})),
    ],
)
def test_every_other_game_can_be_played(game: str) -> None:
    playing = AtariGame(environment(game), 0)
    height, width, _ = playing.screen().shape
    assert (height, width, 3) == screen(game)
    for step in range(5):
        playing.act(step % len(playing.environment.actions))
    assert playing.frames >= 5
