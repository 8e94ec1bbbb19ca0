"""Teaches the network what the expert does, where it comes to by itself: DAgger (Ross et al. 2011).

In turns, the learner plays for some periods, and then the expert shows how it goes on from there. At first the learner
moves at random. Its chunks come some periods late, as they do through a slow network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gym_pusht.envs import PushTEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from actserve.core.signature import INFERENCE_DELAY, PREV_CHUNK
from actserve_export import Chunk, PolicySource
from tests.benchmarks.pusht import expert
from tests.benchmarks.pusht.block import CONTACTS, Floats
from tests.benchmarks.pusht.expert import GOAL
from tests.benchmarks.pusht.policy import HORIZON, LATE, Planner

EXECUTE, PERIOD_S = 4, 0.1
TURNS = 8  # of an episode at most
ALONE, SHOWN = 30, HORIZON + 24  # periods of the learner at most, and of the expert
PACE = 8  # periods between two chunks of the learner, at most
NEAR = 4.0  # of an error: the block is where it should be
WANDERS = 60.0  # pixels, the standard deviation of a random move
SIZE = 512.0  # of the world
OPPOSITE = torch.from_numpy(np.linalg.norm(CONTACTS[:, None] * [-1, 1] - CONTACTS, axis=-1).argmin(-1))
INPUTS = ("observation", PREV_CHUNK, INFERENCE_DELAY)
BATCH, LEARNING_RATE = 256, 1e-3


@dataclass(frozen=True)
class Lessons:
    """The expert's plans. Each begins after the first `delay` actions of `left_over`. See `Planner`."""

    observations: Tensor  # (n, STEPS, 5) f32
    left_over: Tensor  # (n, HORIZON, 2) f32
    delays: Tensor  # (n,) i64
    plans: Tensor  # (n, HORIZON, 2) f32
    contacts: Tensor  # (n,) i64

    def __add__(self, more: Lessons) -> Lessons:
        return Lessons(*(torch.cat(both) for both in zip(self.all, more.all, strict=True)))

    def __getitem__(self, rows: Tensor) -> Lessons:
        return Lessons(*(each[rows] for each in self.all))

    def mirrored(self) -> Lessons:
        """The same in a mirror along the goal's axis, which is a diagonal of the walls, too."""
        agents, blocks, angles = self.observations.split([2, 2, 1], -1)
        turned = (2 * GOAL[2] - angles) % (2 * torch.pi)
        observations = torch.cat([SIZE - agents.flip(-1), SIZE - blocks.flip(-1), turned], -1)
        left_over, plans = (SIZE - each.flip(-1) for each in (self.left_over, self.plans))
        return Lessons(observations, left_over, self.delays, plans, OPPOSITE[self.contacts])

    @property
    def all(self) -> tuple[Tensor, ...]:
        return self.observations, self.left_over, self.delays, self.plans, self.contacts


class Unscored(PushTEnv):
    """Steps in half the time: the score is not computed."""

    def _get_coverage(self) -> float:
        return 0.0


class School:
    """Games, all at once, in which a learner and the expert take turns."""

    def __init__(self, seed: int, games: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._games = [Unscored() for _ in range(games)]
        self._turns = np.zeros(games)
        self._recents: list[Tensor] = []  # of the periods of this turn
        self._targets: list[Tensor] = []  # (games, 2) f32, the same
        self._before = self._seen = np.stack([self._begin(game) for game in self._games])

    def lessons(self, turns: int, learner: Planner | None = None) -> Lessons:
        """Play so many turns. Without a learner, the agent moves at random instead."""
        found: list[Lessons] = []
        for _ in range(turns):
            self._recents.clear()
            self._targets.clear()
            self._wander() if learner is None else self._play(learner)
            found += self._show()
            self._turns += 1
            self._begin_again()
        lessons = Lessons(*(torch.cat(each) for each in zip(*(one.all for one in found), strict=True)))
        return lessons + lessons.mirrored()

    def _begin(self, game: Unscored) -> Floats:
        observation: Floats = game.reset(seed=int(self._rng.integers(1 << 30)))[0]
        return observation

    def _begin_again(self) -> None:
        """Begin those games again that are solved, or have had `TURNS`."""
        missing = np.linalg.norm(expert.error(self._seen[:, 2:]), axis=1)
        over = np.flatnonzero((missing < NEAR) | (self._turns >= TURNS))
        for index in over:
            self._before[index] = self._seen[index] = self._begin(self._games[index])
        self._turns[over] = 0

    def _step(self, targets: Floats) -> None:
        self._recents.append(self._recent)
        self._targets.append(torch.tensor(targets, dtype=torch.float32))
        self._before = self._seen
        self._seen = np.stack([game.step(target)[0] for game, target in zip(self._games, targets, strict=True)])

    @property
    def _recent(self) -> Tensor:
        """The last observations, (games, STEPS, 5) f32."""
        return torch.tensor(np.stack([self._before, self._seen], 1), dtype=torch.float32)

    def _wander(self) -> None:
        targets = np.clip(self._seen[:, :2] + self._rng.normal(0, WANDERS, (len(self._games), 2)), 0, 512)
        for _ in range(self._rng.integers(HORIZON // 2)):
            self._step(targets)

    def _play(self, learner: Planner) -> None:
        late = int(self._rng.integers(LATE + 1))
        pace = self._rng.integers(late + 1, PACE + 1)
        plan, begun = torch.zeros(len(self._games), HORIZON, 2), 0
        for period in range(self._rng.integers(ALONE)):
            if period % pace == 0:
                delay = late if period else 0
                asked, left_over = period, _padded(plan[:, period - begun :])
                with torch.inference_mode():
                    coming = learner(self._recent, left_over, torch.full((len(plan),), delay))
            if period == asked + delay:
                plan, begun = coming, asked
            self._step(plan[:, period - begun].numpy())

    def _show(self) -> list[Lessons]:
        """Lessons for each period from which the expert goes on for HORIZON periods.

        The observation is up to LATE periods older: the learner may have acted since.
        """
        first, contacts = len(self._targets), []
        for _ in range(SHOWN):
            targets, contact = expert.act(self._seen)
            contacts.append(torch.from_numpy(contact))
            self._step(targets)
        targets, found = torch.stack(self._targets, 1), []
        for shown in range(SHOWN - HORIZON + 1):
            asked = first + shown - int(self._rng.integers(min(LATE, first + shown) + 1))
            delay = first + shown - asked
            left_over = _padded(targets[:, asked : asked + delay])
            plan = targets[:, asked : asked + HORIZON]
            delays = torch.full((len(plan),), delay)
            found.append(Lessons(self._recents[asked], left_over, delays, plan, contacts[shown]))
        return found


def _padded(actions: Tensor) -> Tensor:
    """With zeros, to (n, HORIZON, 2)."""
    return nn.functional.pad(actions, (0, 0, 0, HORIZON - actions.shape[1]))


def fit(learner: Planner, lessons: Lessons, steps: int) -> float:
    """Train in random batches -> the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(learner.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(lessons.contacts), (BATCH,))
        loss = learner.loss(*lessons[rows].all)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, steps // 10) :]))


def distilled(
    progress: Callable[[str], None],
    *,
    games: int = 64,
    rounds: int = 5,
    turns: int = 12,
    steps: int = 2000,
    seed: int = 0,
) -> tuple[Planner, Lessons]:
    """A learner after `rounds`, each of so many turns in `games` and so many steps of training, and its lessons."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    school, learner = School(seed, games), Planner()
    progress(f"the expert shows how to play, in {games} games at once")
    lessons = school.lessons(2 * turns)
    for number in range(1, rounds + 1):
        if number > 1:
            lessons += school.lessons(turns, learner.eval())
        progress(f"training {number} of {rounds}, with {len(lessons.contacts):,} plans of the expert")
        progress(f"  loss {fit(learner.train(), lessons, steps):.3f}")
    return learner.eval(), lessons


def source(learner: Planner, lessons: Lessons) -> PolicySource:
    """The source for `export`. The certificate compares the programs on the observations of `lessons`."""

    def observe(count: int) -> TensorDict:
        found = lessons[torch.randint(len(lessons.contacts), (count,))]
        inputs = (found.observations, found.left_over, found.delays)
        return TensorDict(dict(zip(INPUTS, inputs, strict=True)), batch_size=[count])

    return PolicySource(
        TensorDictModule(learner, in_keys=list(INPUTS), out_keys=["actions"]),
        observe(1)[0],
        outputs=("actions",),
        observe=observe,
        observed_in="gym-pusht",
        chunk=Chunk("actions", EXECUTE, period_s=PERIOD_S),
    )
