"""Whole episodes of gym-pusht: by a policy that a service serves, with and without latency, and by the expert.

In real time, the environment takes a step each control period, whether an answer has come or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import gym_pusht  # noqa: F401  registers its environments
import gymnasium
import numpy as np

from actserve import Realtime, RemotePolicy
from tests.benchmarks.pusht import expert

PERIOD_S = 0.1  # gym-pusht's own control period
LONGEST = 300  # control periods of an episode, as gym-pusht has it
LATE_MS = 20.0  # from which on a control period counts as late


@dataclass
class Played:
    """One episode."""

    seed: int
    score: float = 0.0  # the largest share of the goal that the block covered, in percent
    solved: bool = False
    steps: int = 0
    held: int = 0  # control periods in which the last action was repeated, as no new one had come
    late: int = 0  # control periods that began over LATE_MS after their time
    answer_ms: list[float] = field(default_factory=list)


class Game:
    """One episode in the environment. `seen` is the newest observation, (5,) f32."""

    def __init__(self, seed: int, longest: int = LONGEST) -> None:
        self._environment = gymnasium.make("gym_pusht/PushT-v0", obs_type="state", max_episode_steps=longest)
        self.played = Played(seed)
        self.over = False
        self._see(self._environment.reset(seed=seed)[0])
        self._before = self.seen

    def _see(self, observation: Any) -> None:
        self.seen = observation.astype(np.float32)

    @property
    def recent(self) -> Any:
        """The last two observations, (2, 5) f32."""
        return np.stack([self._before, self.seen])

    def step(self, action: Any) -> None:
        """One control period with the agent's target `action`, (2,), unless the episode is over."""
        if self.over:
            return
        self._before = self.seen
        observation, _, terminated, truncated, facts = self._environment.step(np.clip(action, 0, 512))
        self._see(observation)
        self.over = terminated or truncated
        self.played.steps += 1
        self.played.score = max(self.played.score, 100 * float(facts["coverage"]))
        self.played.solved = bool(terminated)

    def close(self) -> None:
        self._environment.close()


def by_the_expert(seed: int) -> Played:
    return _scripted(Game(seed), lambda seen: expert.act(seen[None].astype(np.float64))[0][0])


def standing_still(seed: int) -> Played:
    """One control period: the others are the same."""
    return _scripted(Game(seed, 1), lambda seen: seen[:2])


def _scripted(game: Game, act: Callable[[Any], Any]) -> Played:
    while not game.over:
        game.step(act(game.seen))
    game.close()
    return game.played


def without_latency(url: str, seed: int, longest: int = LONGEST) -> Played:
    """The simulation waits for each chunk, and takes as many of its actions as the policy's signature says."""
    game = Game(seed, longest)
    with RemotePolicy(url) as remote:
        chunk = remote.signature.chunk
        assert chunk is not None
        while not game.over:
            for action in remote.act(_at_once(remote, game))[: chunk.execute]:
                game.step(action)
    game.close()
    return game.played


def in_real_time(url: str, seed: int, longest: int = LONGEST) -> Played:
    """`Realtime` has an action for each control period."""
    game = Game(seed, longest)
    with Realtime(url) as loop:
        for _ in loop:
            game.step(loop.act(game.seen))
            if game.over:
                break
    game.close()
    game.played.held = loop.report.starved
    game.played.late = late(loop.report.late_ms)
    game.played.answer_ms = list(loop.report.answer_ms)
    return game.played


def asking_and_waiting(url: str, seed: int, longest: int = LONGEST) -> Played:
    """Each action is asked for with the newest observation, and waited for; meanwhile the last one is held.

    The environment takes the periods of the wait as soon as it is over: what happens in them is settled before.
    """
    game = Game(seed, longest)
    late_ms: list[float] = []
    with RemotePolicy(url) as remote:
        action = remote.act(_at_once(remote, game))[0]
        due_s = time.monotonic()  # the time of this control period
        while not game.over:
            asked_s = time.monotonic()
            late_ms.append(1000 * (asked_s - due_s))
            answer = remote.act(_at_once(remote, game))[0]
            now_s = time.monotonic()
            game.played.answer_ms.append(1000 * (now_s - asked_s))
            periods = max(1, math.ceil((now_s - due_s) / PERIOD_S))
            before = game.played.steps
            for _ in range(periods):
                game.step(action)
            game.played.held += game.played.steps - before - 1
            due_s += periods * PERIOD_S
            action = answer
            time.sleep(max(0.0, due_s - time.monotonic()))
    game.close()
    game.played.late = late(late_ms)
    return game.played


def _at_once(remote: RemotePolicy, game: Game) -> dict[str, Any]:
    """A request for actions from now on: nothing is left of another chunk, and no delay is expected."""
    inputs = {spec.name: spec.zeros(1)[0] for spec in remote.signature.observations}
    return {**inputs, "observation": game.recent}


def late(late_ms: Iterable[float]) -> int:
    return sum(value > LATE_MS for value in late_ms)
