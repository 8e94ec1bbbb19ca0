"""Games of Pong for training, played side by side on the emulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from numpy.typing import NDArray
from torch import Tensor

CODES = np.array((0, 3, 4))  # ALE's codes of NOOP, RIGHT, LEFT
PALETTE = {
    0: (0, 0, 0),
    14: (236, 236, 236),
    34: (144, 72, 17),
    56: (213, 130, 74),
    200: (92, 186, 92),
    # the next four appear only before the first step of a game
    138: (101, 111, 228),
    210: (53, 95, 24),
    228: (109, 118, 43),
    250: (210, 182, 86),
}

Screens = NDArray[np.uint8]


def picked_pixels() -> NDArray[np.int64]:
    """The flat indices of the pixels that a nearest-neighbour resize of 210x160 to 84x84 keeps, (84 * 84,)."""
    rows, columns = np.arange(84) * 210 // 84, np.arange(84) * 160 // 84
    flat: NDArray[np.int64] = (rows[:, None] * 160 + columns).ravel()
    return flat


def grey_table() -> Screens:
    """Palette index -> the tutorial's grey, 0 to 255 rounded, (256,)."""
    table = np.zeros(256, np.uint8)
    for index, (red, green, blue) in PALETTE.items():
        table[index] = round(0.2989 * red + 0.587 * green + 0.114 * blue)
    return table


class Games:
    """`count` games of Pong side by side, played as Gymnasium's v5 plays them: frame skip 4, sticky actions 0.25.

    `screens` (count, 84, 84) uint8 has the picked pixels as indices into ALE's palette; `before` has those of the last
    step. A finished game restarts, with both the same; `restarted` (count,) bool marks the games that just did.
    """

    def __init__(self, count: int, seed: int) -> None:
        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.games = [_game((seed * 1000 + i) % 2**31) for i in range(count)]  # ALE takes 31 bits
        self.screens: Screens = np.zeros((count, 84, 84), np.uint8)
        self.before = self.screens.copy()
        self.restarted = np.ones(count, bool)
        self.scores = np.zeros(count)
        self.finished: list[float] = []  # the scores of finished games
        self._flat = self.screens.reshape(count, -1)
        self._picked_pixels = picked_pixels()
        for i in range(count):
            self._look(i)
        self.before[:] = self.screens

    def step(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Act in every game; the points won (1) and lost (-1), (count,)."""
        points = np.zeros(len(self.games), np.float32)
        self.before[:] = self.screens
        self.restarted[:] = False
        for i, game in enumerate(self.games):
            points[i] = game.act(int(codes[i]))
            self.scores[i] += points[i]
            if game.game_over(with_truncation=True):
                self.finished.append(float(self.scores[i]))
                self.scores[i] = 0
                game.reset_game()
                self.restarted[i] = True
            self._look(i)
        self.before[self.restarted] = self.screens[self.restarted]
        return points

    def _look(self, i: int) -> None:
        self.games[i].getScreen().ravel().take(self._picked_pixels, out=self._flat[i], mode="clip")


def whole_games(count: int, seed: int, choose: Callable[[Games], Tensor]) -> list[float]:
    """The scores of `count` games, -21 to 21. `choose(games)` gives indices into `CODES`, (count,)."""
    games = Games(count, seed)
    scores: dict[int, float] = {}
    while len(scores) < count:
        before = games.scores.copy()
        points = games.step(CODES[choose(games).numpy()])
        for i in np.flatnonzero(games.restarted):
            scores.setdefault(int(i), float(before[i] + points[i]))
    return list(scores.values())


def _game(seed: int) -> Any:
    game = ALEInterface()
    game.setInt("random_seed", seed)
    game.setFloat("repeat_action_probability", 0.25)
    game.setInt("frame_skip", 4)
    game.setInt("max_num_frames_per_episode", 108_000)
    game.loadROM(roms.get_rom_path("pong"))
    game.reset_game()
    return game
