"""Plays whole games: the loop that shows each screen to a policy and takes its action."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actserve.atari.emulator import AtariGame
from actserve.core.environment import Environment

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}


@dataclass(frozen=True)
class EpisodeResult:
    """One game. `actions_sha256` hashes the indices of the actions in order, one byte each."""

    seed: int
    score: float
    steps: int
    actions_sha256: str


@dataclass(frozen=True)
class Report:
    """The result of `play`. Latencies cover only the calls of `act`, not the emulator."""

    policy: str
    runtime: str
    game: str  # the ROM's name
    episodes: tuple[EpisodeResult, ...]
    latency_ms: dict[str, float]  # p50, p90, p99, p999
    acting_s: float  # total time in `act`

    @property
    def scores(self) -> list[float]:
        return [episode.score for episode in self.episodes]

    @property
    def steps(self) -> int:
        return sum(episode.steps for episode in self.episodes)

    def as_json(self) -> dict[str, Any]:
        """The object that `actserve play --json` prints."""
        return {
            "policy": self.policy,
            "runtime": self.runtime,
            "scores": self.scores,
            "episodes": [asdict(episode) for episode in self.episodes],
            "latency_ms": self.latency_ms,
        }


Act = Callable[[NDArray[np.uint8]], Any]


def play(
    begin_episode: Callable[[int], Act],
    environment: Environment,
    *,
    episodes: int,
    seed: int,
    policy: str = "",
    runtime: str = "",
    max_steps: int | None = None,
    on_step: Callable[[int, AtariGame, int], None] | None = None,
) -> Report:
    """Play `episodes` games, the i-th seeded with `seed + i`, each to its end or for `max_steps` actions.

    `begin_episode` takes a game's seed and returns the function `act` for that game. `act` takes the screen, (height,
    width, 3) uint8, in a buffer that the next step overwrites, and returns the index of an action (anything that `int`
    accepts). After every step, `on_step` gets the game's number, from 0, the game and the action. `policy` and
    `runtime` only label the report. Raises the errors of `AtariGame`, `begin_episode` and `act`.
    """
    played: list[EpisodeResult] = []
    latencies_ns: list[int] = []
    for number in range(episodes):
        game = AtariGame(environment, seed + number)
        act = begin_episode(seed + number)
        actions = bytearray()
        while not game.over and (max_steps is None or game.steps < max_steps):
            screen = game.screen()
            begun = time.perf_counter_ns()
            answer = act(screen)
            latencies_ns.append(time.perf_counter_ns() - begun)
            action = int(answer)
            game.act(action)
            actions.append(action)
            if on_step is not None:
                on_step(number, game, action)
        played.append(EpisodeResult(seed + number, game.score, game.steps, hashlib.sha256(actions).hexdigest()))
    return Report(
        policy, runtime, environment.game, tuple(played), _percentiles_ms(latencies_ns), sum(latencies_ns) / 1e9
    )


def _percentiles_ms(latencies_ns: list[int]) -> dict[str, float]:
    if not latencies_ns:
        return dict.fromkeys(PERCENTILES, 0.0)
    values = np.percentile(latencies_ns, list(PERCENTILES.values()))
    return {name: round(value / 1e6, 4) for name, value in zip(PERCENTILES, values.tolist(), strict=True)}
