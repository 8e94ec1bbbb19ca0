"""Atari games for training, played side by side on the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from numpy.typing import NDArray
from torch import Tensor, nn
from torchrl.data import TensorSpec

Bytes = NDArray[np.uint8]
GREY = np.array((0.2989, 0.587, 0.114), np.float32)  # the tutorial's weights of red, green and blue
QUIET_STEPS = 2_500  # after so many steps without a reward or a lost life, an evaluation calls a game over


def kept_pixels(height: int, width: int) -> NDArray[np.int64]:
    """The flat indices of the pixels that a nearest-neighbour resize to 84x84 keeps, (84 * 84,)."""
    rows, columns = np.arange(84) * height // 84, np.arange(84) * width // 84
    flat: NDArray[np.int64] = (rows[:, None] * width + columns).ravel()
    return flat


class View(Protocol):
    """A teacher's observation of games, and a network for it."""

    def look(self, emulator: Any) -> Bytes:
        """Read one game after a step: (n,) uint8."""

    def see(self, now: Bytes, before: Bytes) -> Tensor:
        """The results of `look` for N games, now and a step before, (N, n) each -> the observation (N, ...)."""

    def spec(self, count: int) -> TensorSpec:
        """The specification of `see` for `count` games."""

    def network(self, outputs: int, movement: bool) -> nn.Module:
        """A new network: the result of `see` -> (N, outputs). Without `movement` it takes no account of `before`."""


@dataclass(frozen=True)
class Game:
    """A game as it is played for training."""

    rom: str  # its name in ale-py
    codes: tuple[int, ...]  # ALE's codes of the actions that teacher and student choose from
    view: View
    point_is_episode: bool = False  # the teacher's episode ends with every reward; otherwise with every life


class Games:
    """`count` games side by side, played as Gymnasium's v5 plays them: frame skip 4, sticky actions 0.25.

    `now` and `before` (count, n) uint8 are what the view's `look` returned after the last step and the one before it. A
    finished game restarts, with both the same; `restarted` (count,) bool marks the games that just did. `ended`
    (count,) bool marks the games in which the last step ended an episode of the teacher.
    """

    def __init__(self, game: Game, count: int, seed: int) -> None:
        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.game = game
        self.emulators = [_emulator(game.rom, (seed * 1000 + i) % 2**31) for i in range(count)]  # ALE takes 31 bits
        self.now = np.stack([game.view.look(emulator) for emulator in self.emulators])
        self.before = self.now.copy()
        self.restarted = np.ones(count, bool)
        self.ended = np.zeros(count, bool)
        self.scores = np.zeros(count)
        self.finished: list[float] = []  # the scores of finished games
        self._kept = kept_pixels(*self.emulators[0].getScreenDims())
        self._lives = np.array([emulator.lives() for emulator in self.emulators])

    def __len__(self) -> int:
        return len(self.emulators)

    def step(self, actions: Tensor) -> NDArray[np.float32]:
        """Act in every game, with indices into the game's codes, (count,); the rewards, (count,)."""
        rewards = np.zeros(len(self), np.float32)
        self.before[:] = self.now
        self.restarted[:] = False
        for i, (emulator, action) in enumerate(zip(self.emulators, actions.tolist(), strict=True)):
            rewards[i] = emulator.act(self.game.codes[action])
            self.scores[i] += rewards[i]
            if emulator.game_over(with_truncation=True):
                self.finished.append(float(self.scores[i]))
                self.scores[i] = 0
                emulator.reset_game()
                self.restarted[i] = True
            self.now[i] = self.game.view.look(emulator)
        self.before[self.restarted] = self.now[self.restarted]
        lives = np.array([emulator.lives() for emulator in self.emulators])
        self.ended = self.restarted | ((rewards != 0) if self.game.point_is_episode else (lives < self._lives))
        self._lives = lives
        return rewards

    def greys(self) -> Bytes:
        """The screens as the policy sees them, (count, 84, 84): the tutorial's resize and grey, 0 to 255 rounded."""
        screens = np.stack([emulator.getScreenRGB().reshape(-1, 3).take(self._kept, 0) for emulator in self.emulators])
        greys: Bytes = np.rint(screens @ GREY).astype(np.uint8)
        return greys.reshape(-1, 84, 84)


def whole_games(game: Game, count: int, seed: int, choose: Callable[[Games], Tensor]) -> list[float]:
    """The scores of `count` games. `choose(games)` gives indices into the game's codes, (count,).

    A policy that waits for ever, as one that never serves the ball, has its score after `QUIET_STEPS`.
    """
    games = Games(game, count, seed)
    quiet = np.zeros(count, np.int64)
    scores: dict[int, float] = {}
    while len(scores) < count:
        before = games.scores.copy()
        rewards = games.step(choose(games))
        quiet = np.where((rewards != 0) | games.ended, 0, quiet + 1)
        for i in np.flatnonzero(games.restarted | (quiet >= QUIET_STEPS)):
            scores.setdefault(int(i), float(before[i] + rewards[i]))
    return list(scores.values())


def _emulator(rom: str, seed: int) -> Any:
    emulator = ALEInterface()
    emulator.setInt("random_seed", seed)
    emulator.setFloat("repeat_action_probability", 0.25)
    emulator.setInt("frame_skip", 4)
    emulator.setInt("max_num_frames_per_episode", 108_000)
    emulator.loadROM(roms.get_rom_path(rom))
    emulator.reset_game()
    return emulator
