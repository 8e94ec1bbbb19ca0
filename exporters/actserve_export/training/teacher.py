"""Pong's teacher: PPO (Schulman et al. 2017) on a few numbers that are read from the 84x84 screen.

The numbers are the ball's x and y, both paddles' y, and the ball's height over the own paddle, and then the movement of
the ball and the own paddle since the last screen. A student without memory cannot see movement, so its teacher acts
without it. The critic, which only judges the actions, always has it (Pinto et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchrl.collectors import Collector
from torchrl.data import (
    Categorical,
    Composite,
    LazyTensorStorage,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from actserve_export.training.games import CODES, Games, Screens, whole_games

BALL, ENEMY, OWN = 14, 56, 200  # indices into ALE's palette
FIELD = slice(14, 78)  # the rows of the 84 between the walls
ENEMY_COLUMN, OWN_COLUMN = 9, 75
NEAR = 40  # the ball's height over the own paddle is exact up to this many half rows
SIZES: tuple[int, ...] = (85, 128, 128, 128, 2 * NEAR + 2)  # bins of each number, including "not visible"
MOVES = (12, 40, 24)  # the largest exact movement of the ball's x and y and the own paddle's y
MOVE_SIZES = tuple(2 * most + 2 for most in MOVES)


def features(screens: Screens, before: Screens) -> Tensor:
    """Palette indices, (N, 84, 84), and those of the last step -> (N, 8) int64: each number's bin.

    The bins of all numbers are rows of one table, `sum(SIZES + MOVE_SIZES)` long, those without movement first.
    """
    ball_x, ball_y, own_y, enemy_y = _places(screens)
    over = np.where((ball_x < 84) & (own_y < 127), np.clip(ball_y - own_y, -NEAR, NEAR) + NEAR, 2 * NEAR + 1)
    numbers = [ball_x, ball_y, own_y, enemy_y, over]
    x, y, own, _ = _places(before)
    both = (ball_x < 84) & (x < 84)
    seen = (both, both, (own_y < 127) & (own < 127))
    for most, moved, known in zip(MOVES, (ball_x - x, ball_y - y, own_y - own), seen, strict=True):
        numbers.append(np.where(known, np.clip(moved, -most, most) + most, 2 * most + 1))
    return torch.from_numpy(np.stack(numbers, 1) + np.cumsum((0, *(SIZES + MOVE_SIZES)[:-1])))


def _places(screens: Screens) -> tuple[NDArray[np.int64], ...]:
    """The ball's x (84: not visible) and y, the own paddle's y and the other's, in half rows (127: not visible)."""
    field = screens[:, FIELD]
    ball = field == BALL
    seen, ball_y = _middle(ball.any(2))
    ball_x = np.where(seen, ball.any(1).argmax(1), 84)
    _, own_y = _middle(field[:, :, OWN_COLUMN] == OWN)
    _, enemy_y = _middle(field[:, :, ENEMY_COLUMN] == ENEMY)
    return ball_x, ball_y, own_y, enemy_y


def _middle(rows: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(N, 64) -> whether any row is set, (N,), and the middle of the set rows in half rows, else 127."""
    seen = np.asarray(rows.any(axis=1))
    middle = rows.argmax(1) + 63 - rows[:, ::-1].argmax(1)
    return seen, np.where(seen, middle, 127)


class Points(EnvBase):
    """`Games` as a TorchRL environment, batch size [games]: an action is an index into `CODES`, a point an episode.

    A game continues after a point, so resetting does nothing.
    """

    def __init__(self, games: Games) -> None:
        count = len(games.games)
        super().__init__(batch_size=[count])
        self.games = games
        sizes = SIZES + MOVE_SIZES
        self.observation_spec = Composite(bins=Categorical(sum(sizes), (count, len(sizes))), shape=[count])
        self.action_spec = Categorical(len(CODES), (count,))
        self.reward_spec = Unbounded((count, 1))

    def _reset(self, _tensordict: TensorDictBase | None, **_options: Any) -> TensorDict:
        return TensorDict({"bins": _see(self.games)}, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        points = torch.from_numpy(self.games.step(CODES[tensordict["action"].numpy()]))[:, None]
        scored = points != 0
        after = {"bins": _see(self.games), "reward": points, "terminated": scored, "done": scored}
        return TensorDict(after, batch_size=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        """The games have their own seeds."""


def _see(games: Games) -> Tensor:
    return features(games.screens, games.before)


def network(outputs: int, movement: bool) -> nn.Module:
    """Bins (N, 8) -> (N, outputs). The hidden layers have 192 (a table of the bins) and 128.

    Without `movement`, it takes only the bins of the places.
    """
    sizes = SIZES + MOVE_SIZES if movement else SIZES
    table = nn.EmbeddingBag(sum(sizes), 192, mode="sum")
    nn.init.normal_(table.weight, std=0.3)
    last = nn.Linear(128, outputs)
    nn.init.orthogonal_(last.weight, 0.01 if outputs > 1 else 1.0)
    nn.init.zeros_(last.bias)
    return nn.Sequential(_SumOfEmbeddings(table, len(sizes)), nn.ReLU(), nn.Linear(192, 128), nn.ReLU(), last)


def moving_average(network: nn.Module, updates: int) -> AveragedModel:
    """A copy of `network` whose weights become the exponential moving average over so many updates."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / updates)).requires_grad_(False)


class _SumOfEmbeddings(nn.Module):
    """An EmbeddingBag over the first `count` of the last axis, (..., bins) -> (..., 192)."""

    def __init__(self, table: nn.EmbeddingBag, count: int) -> None:
        super().__init__()
        self.table, self.count = table, count

    def forward(self, bins: Tensor) -> Tensor:
        summed: Tensor = self.table(bins[..., : self.count].reshape(-1, self.count))
        return summed.reshape(*bins.shape[:-1], -1)


@dataclass(frozen=True)
class TeacherRecipe:
    """PPO's hyperparameters. Steps are environment steps, each of 4 emulator frames."""

    total_steps: int = 24_000_000
    movement: bool = False  # whether the teacher sees it
    games: int = 32
    steps_per_round: int = 128  # in each game
    epochs: int = 4
    batch_size: int = 1024
    learning_rate: float = 7e-4  # constant for 40 %, then linear to 5 %
    gamma: float = 0.99
    late_gamma: float = 0.9995  # from 2/3 on: learn quick points first, then points after long rallies
    lmbda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01  # falls linearly to 10 %
    critic: float = 0.5
    critic_share: float = 0.0  # of the steps, at the start: only the critic learns
    average_over: int = 2_000  # updates in the exponential moving average of the weights that the student learns from
    evaluate_every: int = 1_000_000
    evaluation_games: int = 24
    imitation_steps: int = 0  # steps before PPO, in which the teacher learns what the student does
    imitation_rate: float = 2e-3  # linear to 2 %


CONTINUED = TeacherRecipe(
    total_steps=9_000_000,
    games=64,
    epochs=3,
    batch_size=2048,
    learning_rate=4e-4,
    gamma=0.9995,
    entropy=0.004,
    critic_share=0.05,
    imitation_steps=600_000,
)
"""The recipe of a teacher that begins with what a student has learnt from an earlier one."""


class Teacher:
    """The teacher and its training."""

    def __init__(self, recipe: TeacherRecipe) -> None:
        self.recipe = recipe
        self.steps = 0
        self.imitated = 0
        self.policy, self.value = network(len(CODES), recipe.movement), network(1, movement=True)
        self.actor = ProbabilisticActor(
            TensorDictModule(self.policy, in_keys=["bins"], out_keys=["logits"]),
            in_keys=["logits"],
            spec=Categorical(len(CODES)),
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        critic = ValueOperator(self.value, in_keys=["bins"])
        self.advantage = GAE(gamma=recipe.gamma, lmbda=recipe.lmbda, value_network=critic, deactivate_vmap=True)
        self.loss = ClipPPOLoss(
            self.actor,
            critic,
            clip_epsilon=recipe.clip,
            entropy_coeff=recipe.entropy,
            critic_coeff=recipe.critic,
            loss_critic_type="l2",
            normalize_advantage=True,
        )
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=recipe.learning_rate, eps=1e-5)
        self.average = moving_average(self.policy, recipe.average_over)

    def probabilities(self, games: Games) -> Tensor:
        """(games, 3): the probabilities of NOOP, RIGHT, LEFT."""
        with torch.no_grad():
            probabilities: Tensor = self.average(_see(games)).softmax(-1)
        return probabilities

    def evaluate(self, seed: int) -> list[float]:
        """The scores of whole games with greedy actions, -21 to 21."""
        return whole_games(self.recipe.evaluation_games, seed, lambda games: self.probabilities(games).argmax(-1))

    def imitate(
        self, games: Games, values: Callable[[Games], TensorDict], after_round: Callable[[int, float], None]
    ) -> None:
        """Learn the action probabilities of a policy: `values(games)["values"]` (games, 3) are its logits.

        The policy plays, with every tenth action at random. `after_round` gets the steps and the loss of each round.
        """
        recipe = self.recipe
        optimizer = torch.optim.Adam(self.policy.parameters(), lr=recipe.imitation_rate)
        replay = TensorDictReplayBuffer(storage=LazyTensorStorage(200_000), batch_size=1024)
        count = len(games.games)
        while self.imitated < recipe.imitation_steps:
            optimizer.param_groups[0]["lr"] = recipe.imitation_rate * (
                1 - 0.98 * self.imitated / recipe.imitation_steps
            )
            for _ in range(8):
                bins, found = _see(games), values(games)["values"].softmax(-1)
                replay.extend(TensorDict({"bins": bins, "target": found}, batch_size=[count]))
                action = torch.where(torch.rand(count) < 0.1, torch.randint(len(CODES), (count,)), found.argmax(-1))
                games.step(CODES[action.numpy()])
            for _ in range(2):
                batch = replay.sample()
                logits = self.policy(batch["bins"]).log_softmax(-1)
                loss = nn.functional.kl_div(logits, batch["target"], reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            self.imitated += 8 * count
            after_round(8 * count, float(loss.detach()))
        self.average.module.load_state_dict(self.policy.state_dict())

    def train(self, games: Games, after_round: Callable[[float], None]) -> None:
        """Learn for the recipe's steps. `after_round` gets each round's points per 1,000 steps."""
        size = self.recipe.games * self.recipe.steps_per_round
        replay = TensorDictReplayBuffer(
            storage=LazyTensorStorage(size), sampler=SamplerWithoutReplacement(), batch_size=self.recipe.batch_size
        )
        collector = Collector(
            Points(games),
            self.actor,
            frames_per_batch=size,
            total_frames=-1,
            auto_register_policy_transforms=False,
        )
        for data in collector:
            self._schedule(self.steps / self.recipe.total_steps)
            with torch.no_grad():
                self.advantage(data)
            replay.empty()
            replay.extend(data.reshape(-1))
            for _ in range(self.recipe.epochs):
                for batch in replay:
                    self._update(batch)
            self.steps += size
            after_round(1000 * float(data["next", "reward"].mean()))
            if self.steps >= self.recipe.total_steps:
                break
        collector.shutdown()

    def _schedule(self, done: float) -> None:
        share = 1 - 0.95 * max(0.0, (done - 0.4) / 0.6)
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * share
        self.advantage.gamma.fill_(self.recipe.gamma if done < 2 / 3 else self.recipe.late_gamma)
        self.loss.entropy_coeff.fill_(self.recipe.entropy * (1 - 0.9 * done))

    def _update(self, batch: TensorDict) -> None:
        losses = self.loss(batch)
        self.optimizer.zero_grad()
        loss = losses["loss_critic"]
        if self.steps >= self.recipe.critic_share * self.recipe.total_steps:
            loss = loss + losses["loss_objective"] + losses["loss_entropy"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), 0.5)
        self.optimizer.step()
        self.average.update_parameters(self.policy)
