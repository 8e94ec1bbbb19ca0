"""Atari games with the settings of the training environment, on the Arcade Learning Environment (ALE) itself.

A policy's action i is an index into its environment's actions; the emulator takes ALE's codes. A game is refused if the
environment's actions are neither its minimal set nor all 18: an index would then have another meaning than in training.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actserve.core.environment import Environment, GameAction
from actserve.core.errors import EnvironmentMismatch, UsageError
from actserve.core.imports import import_extra


class AtariGame:
    """One game from its first screen to its end.

    `seed` (a whole number from 0) gives the same game as `gymnasium.make(environment.id).reset(seed=seed)`. Raises
    `UsageError` for an unknown game, `EnvironmentMismatch` if the game's actions differ from the environment's.
    """

    def __init__(self, environment: Environment, seed: int) -> None:
        self.environment = environment
        self.score = 0.0  # the sum of the rewards so far
        self.steps = 0  # the number of actions so far
        self._ale = _emulator(environment, seed)
        found = _actions(self._ale.getMinimalActionSet())
        if environment.actions not in (found, _actions(self._ale.getLegalActionSet())):
            raise EnvironmentMismatch(
                f"the policy was trained on {environment.game} with the actions {_listed(environment.actions)}; "
                f"the installed ale-py has {_listed(found)}, or all 18",
                expected=[vars(action) for action in environment.actions],
                got=[vars(action) for action in found],
            )
        self._ale.reset_game()
        self._screen: NDArray[np.uint8] = np.empty((*self._ale.getScreenDims(), 3), np.uint8)

    def screen(self) -> NDArray[np.uint8]:
        """The screen, (height, width, 3) uint8 RGB. The next call overwrites the returned array."""
        self._ale.getScreenRGB(self._screen)
        return self._screen

    def act(self, index: int) -> float:
        """Take the policy's action `index` for `frame_skip` frames. Returns the sum of their rewards."""
        actions = self.environment.actions
        if not 0 <= index < len(actions):
            raise EnvironmentMismatch(
                f"expected an action from 0 to {len(actions) - 1} ({_listed(actions)}); got {index}", got=index
            )
        reward = float(self._ale.act(actions[index].code))
        self.score += reward
        self.steps += 1
        return reward

    @property
    def over(self) -> bool:
        """Whether the game is lost, won, or has reached the environment's maximum length."""
        return bool(self._ale.game_over())

    @property
    def frames(self) -> int:
        """The number of emulator frames so far."""
        return int(self._ale.getEpisodeFrameNumber())


def _emulator(environment: Environment, seed: int) -> Any:
    """An `ALEInterface` with the game loaded. ALE ignores settings that are made after the ROM is loaded."""
    if seed < 0:
        raise UsageError(f"expected a seed of 0 or more; got {seed}")
    ale_py = import_extra("play", "ale_py")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", _ale_seed(seed))
    ale.setInt("frame_skip", environment.frame_skip)
    ale.setInt("max_num_frames_per_episode", environment.max_frames)
    ale.setFloat("repeat_action_probability", environment.repeat_action_probability)
    ale.loadROM(_rom(environment.game))
    return ale


def _ale_seed(seed: int) -> int:
    """The ALE seed (int32) for `seed`, derived as Gymnasium does, so that the games are the same."""
    return int(np.random.SeedSequence(seed).generate_state(2)[1].astype(np.int32))


def _rom(game: str) -> Any:
    roms = import_extra("play", "ale_py.roms")
    known = roms.get_all_rom_ids()
    if game not in known:
        close = difflib.get_close_matches(game.lower(), known, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"ale-py has {len(known)}, such as pong and breakout"
        raise UsageError(f"no game named {game[:80]!r}; {hint}", got=game[:80], close=close)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # ale-py prints about ALE_ROMS_DIR; stdout is for results
            path = roms.get_rom_path(game)
    except OSError as error:
        raise UsageError(f"the ROM of {game} cannot be read: {error}") from error
    if import_extra("play", "ale_py").ALEInterface.isSupportedROM(path) is None:  # loading it would end the process
        raise UsageError(f"{game} is for two players; ale-py has its ROM but cannot play it")
    return path


def _actions(codes: Iterable[Any]) -> tuple[GameAction, ...]:
    return tuple(GameAction(code.name, int(code.value)) for code in codes)


def _listed(actions: Iterable[GameAction]) -> str:
    return ", ".join(f"{action.meaning}({action.code})" for action in actions)
