"""The teacher: PPO (Schulman et al. 2017) on a `View` of the games, which is not the screen.

A student without memory cannot see movement, so its teacher acts without it. The critic, which only judges the actions,
always has it (Pinto et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
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

from actserve_export.training.games import Game, Games, whole_games


class GamesEnv(EnvBase):
    """`Games` as a TorchRL environment, batch size [games]. An action is an index into the game's codes.

    Rewards are -1, 0 or 1. Games restart by themselves, and go on after an episode, so resetting does nothing.
    """

    def __init__(self, games: Games) -> None:
        count = len(games)
        super().__init__(batch_size=[count])
        self.games = games
        self.observation_spec = Composite(seen=games.game.view.spec(count), shape=[count])
        self.action_spec = Categorical(len(games.game.codes), (count,))
        self.reward_spec = Unbounded((count, 1))

    def _reset(self, _tensordict: TensorDictBase | None, **_options: Any) -> TensorDict:
        return TensorDict({"seen": see(self.games)}, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        rewards = torch.from_numpy(self.games.step(tensordict["action"]))[:, None].sign()
        ended = torch.from_numpy(self.games.ended)[:, None]
        after = {"seen": see(self.games), "reward": rewards, "terminated": ended, "done": ended}
        return TensorDict(after, batch_size=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        """The games have their own seeds."""


def see(games: Games) -> Tensor:
    """The teacher's observation now, (games, ...)."""
    return games.game.view.see(games.now, games.before)


def _network(game: Game, outputs: int, movement: bool) -> nn.Module:
    """The view's network, whose first outputs are nearly 0 for a policy."""
    network = game.view.network(outputs, movement)
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    nn.init.orthogonal_(last.weight, 0.01 if outputs > 1 else 1.0)
    nn.init.zeros_(last.bias)
    return network


def moving_average(network: nn.Module, updates: int) -> AveragedModel:
    """A copy of `network` whose weights become the exponential moving average over so many updates."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / updates)).requires_grad_(False)


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
    late_gamma: float = 0.9995  # in the last third, in which rewards that come late count, too
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


ANY_GAME = TeacherRecipe(total_steps=4_000_000, learning_rate=5e-4, late_gamma=0.997)
"""The recipe of a teacher that sees RAM."""


class Teacher:
    """The teacher and its training."""

    def __init__(self, game: Game, recipe: TeacherRecipe) -> None:
        self.game = game
        self.recipe = recipe
        self.steps = 0
        self.imitated = 0
        self.policy = _network(game, len(game.codes), recipe.movement)
        self.value = _network(game, 1, movement=True)
        self.actor = ProbabilisticActor(
            TensorDictModule(self.policy, in_keys=["seen"], out_keys=["logits"]),
            in_keys=["logits"],
            spec=Categorical(len(game.codes)),
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        critic = ValueOperator(self.value, in_keys=["seen"])
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
        """(games, actions): the probabilities of the actions."""
        with torch.no_grad():
            probabilities: Tensor = self.average(see(games)).softmax(-1)
        return probabilities

    def evaluate(self, seed: int) -> list[float]:
        """The scores of whole games with greedy actions."""
        count = self.recipe.evaluation_games
        return whole_games(self.game, count, seed, lambda games: self.probabilities(games).argmax(-1))

    def imitate(
        self, games: Games, values: Callable[[Games], TensorDict], after_round: Callable[[int, float], None]
    ) -> None:
        """Learn the action probabilities of a policy: `values(games)["values"]` (games, actions) are its logits.

        The policy plays, with every tenth action at random. `after_round` gets the steps and the loss of each round.
        """
        recipe = self.recipe
        optimizer = torch.optim.Adam(self.policy.parameters(), lr=recipe.imitation_rate)
        replay = TensorDictReplayBuffer(storage=LazyTensorStorage(200_000), batch_size=1024)
        count, actions = len(games), len(self.game.codes)
        while self.imitated < recipe.imitation_steps:
            optimizer.param_groups[0]["lr"] = recipe.imitation_rate * (
                1 - 0.98 * self.imitated / recipe.imitation_steps
            )
            for _ in range(8):
                seen, found = see(games), values(games)["values"].softmax(-1)
                replay.extend(TensorDict({"seen": seen, "target": found}, batch_size=[count]))
                action = torch.where(torch.rand(count) < 0.1, torch.randint(actions, (count,)), found.argmax(-1))
                games.step(action)
            for _ in range(2):
                batch = replay.sample()
                logits = self.policy(batch["seen"]).log_softmax(-1)
                loss = nn.functional.kl_div(logits, batch["target"], reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            self.imitated += 8 * count
            after_round(8 * count, float(loss.detach()))
        self.average.module.load_state_dict(self.policy.state_dict())

    def train(self, games: Games, after_round: Callable[[float], None]) -> None:
        """Learn for the recipe's steps. `after_round` gets the mean of each round's rewards, per 1,000 steps."""
        size = self.recipe.games * self.recipe.steps_per_round
        replay = TensorDictReplayBuffer(
            storage=LazyTensorStorage(size), sampler=SamplerWithoutReplacement(), batch_size=self.recipe.batch_size
        )
        collector = Collector(
            GamesEnv(games),
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
