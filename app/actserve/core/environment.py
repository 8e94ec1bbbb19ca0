"""The game that a policy was trained in. A client must reproduce it, or the policy does not act as trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from pydantic import ConfigDict

from actserve.core.robot import Robot

EMULATOR_FPS = 60


@dataclass(frozen=True)
class GameAction:
    """One discrete action: `meaning` is ALE's name ("RIGHTFIRE"), `code` is the argument of `ALEInterface.act`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    meaning: str
    code: int


@dataclass(frozen=True)
class Environment:
    """An Arcade Learning Environment game, as trained (Machado et al. 2018, "Revisiting the ALE").

    `actions[i]` is the meaning of the policy's action i. The index i is not an ALE code.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str  # Gymnasium id, "ALE/Pong-v5"
    game: str  # ROM name in ale-py, "pong"
    screen: str  # name of the observation that takes the RGB screen
    actions: tuple[GameAction, ...]
    frame_skip: int = 4  # emulator frames per action
    repeat_action_probability: float = 0.25  # sticky actions
    max_frames: int = 108_000  # emulator frames per episode: half an hour of play

    @property
    def actions_per_second(self) -> float:
        """At the speed of the console."""
        return EMULATOR_FPS / self.frame_skip


Contract: TypeAlias = Environment | Robot


def game_of(contract: Contract | None) -> Environment | None:
    """The game that the policy plays; None for a robot's policy."""
    return contract if isinstance(contract, Environment) else None
