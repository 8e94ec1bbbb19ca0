"""The world a policy was trained in: what a client must reproduce for the policy to act as trained."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict


@dataclass(frozen=True)
class GameAction:
    """One discrete action: `meaning` as ALE spells it ("RIGHTFIRE"), `code` what `ALEInterface.act` takes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    meaning: str
    code: int


@dataclass(frozen=True)
class Environment:
    """An Arcade Learning Environment game, as trained (Machado et al. 2018, "Revisiting the ALE").

    `actions[i]` is what the policy's action i means: an index is not an ALE code.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str  # Gymnasium's id, "ALE/Pong-v5"
    game: str  # the ROM's name in ale-py, "pong"
    screen: str  # the observation that takes the RGB screen
    actions: tuple[GameAction, ...]
    frame_skip: int = 4  # emulator frames per action
    repeat_action_probability: float = 0.25  # sticky actions
    max_frames: int = 108_000  # emulator frames per episode: half an hour of play
