"""The tutorial's DQN (Mnih et al. 2015; van Hasselt et al. 2016), for any game of the Arcade Learning Environment."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Categorical, LazyTensorStorage, ReplayBuffer
from torchrl.modules import EGreedyModule
from torchrl.objectives import DQNLoss, SoftUpdate

from actserve_export.training import atari
from actserve_export.training.run import Run, optimizer_tensors, prefixed, progress_bar, restore_optimizer, unprefixed


@dataclass(frozen=True)
class Recipe:
    """DQN's hyperparameters. Steps are environment steps, each of 4 emulator frames."""

    total_frames: int = 400_000
    frames_per_batch: int = 64  # steps collected between two rounds of updates
    updates_per_batch: int = 16
    batch_size: int = 32
    buffer_size: int = 50_000
    warm_up: int = 5_000  # random steps before learning
    learning_rate: float = 2.5e-4
    gamma: float = 0.99
    target_decay: float = 0.995  # of the target network, per update
    epsilon_init: float = 1.0
    epsilon_end: float = 0.02
    epsilon_steps: int = 60_000


def train(run: Run, seed: int, game: str = "pong", recipe: Recipe | None = None) -> None:
    """Double DQN from TorchRL's parts. Resumes from the run's checkpoint."""
    recipe = recipe or Recipe()
    torch.manual_seed(seed)
    environment = atari.environment(game)
    learner = _Learner(recipe, len(environment.actions))
    learner.restore(run.restore())
    run.describe(game=game, seed=seed, method="dqn", recipe=asdict(recipe))
    total = run.total_frames or recipe.total_frames
    remaining = total - int(run.counters["frames"])
    if remaining <= 0:
        return
    learner.explore.eps.fill_(_epsilon(recipe, int(run.counters["frames"])))
    env = atari.make_env(environment)
    env.set_seed(seed + int(run.counters["frames"]))
    collector = Collector(
        env,
        TensorDictSequential(learner.policy, learner.explore),
        frames_per_batch=recipe.frames_per_batch,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )
    returns: deque[float] = deque(maxlen=20)
    episode_return = 0.0
    with progress_bar() as bar:
        task = bar.add_task(game, total=total, completed=int(run.counters["frames"]))
        for data in collector:
            rewards = data["next", "reward"].flatten().tolist()
            for reward, done in zip(rewards, data["next", "done"].flatten().tolist(), strict=True):
                episode_return += reward
                if done:
                    returns.append(episode_return)
                    episode_return = 0.0
            loss = learner.learn(data)
            run.step(data.numel(), int(data["next", "done"].sum()))
            frames = int(run.counters["frames"])
            learner.explore.eps.fill_(_epsilon(recipe, frames))
            finished = frames >= total
            mean = sum(returns) / len(returns) if returns else math.nan  # no episode has ended yet
            if frames // 2000 != (frames - data.numel()) // 2000 or finished:
                run.record(mean_return=mean, loss=loss, epsilon=_epsilon(recipe, frames))
            bar.update(task, completed=frames, description=f"{game}  {frames:,} steps  mean return {mean:+.1f}")
            if finished or run.save_is_due:
                run.save(*learner.tensors())
            if finished:
                break
    collector.shutdown()


def _epsilon(recipe: Recipe, frames: int) -> float:
    share = min(1.0, frames / recipe.epsilon_steps)
    return recipe.epsilon_init + share * (recipe.epsilon_end - recipe.epsilon_init)


_KEPT = ("pixels", "action", *(("next", key) for key in ("pixels", "reward", "done", "terminated")))


class _Learner:
    """Networks, loss, optimiser and replay of one DQN run."""

    def __init__(self, recipe: Recipe, actions: int) -> None:
        self.recipe = recipe
        self.network = atari.value_network(actions)
        self.policy = atari.greedy(self.network, actions)
        self.explore = EGreedyModule(
            Categorical(actions),
            eps_init=recipe.epsilon_init,
            eps_end=recipe.epsilon_end,
            annealing_num_steps=recipe.epsilon_steps,
        )
        self.loss = DQNLoss(self.policy, action_space="categorical", delay_value=True, double_dqn=True)
        self.loss.make_value_estimator(gamma=recipe.gamma)
        self.target = SoftUpdate(self.loss, eps=recipe.target_decay)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=recipe.learning_rate)
        self.replay = ReplayBuffer(
            storage=LazyTensorStorage(recipe.buffer_size), batch_size=recipe.batch_size, prefetch=0
        )

    def learn(self, data: Any) -> float:
        """Store a batch of steps, then update; returns the last loss, or 0 during warm-up."""
        self.replay.extend(_pack(data.select(*_KEPT).reshape(-1)))
        if len(self.replay) < min(self.recipe.warm_up, self.recipe.buffer_size):
            return 0.0
        for _ in range(self.recipe.updates_per_batch):
            loss = self.loss(_unpack(self.replay.sample()))["loss"]
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.loss.parameters(), 10.0)
            self.optimizer.step()
            self.target.step()
        return float(loss.detach())

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(weights, tensors for resuming)."""
        weights = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        target = self.loss.target_value_network_params.flatten_keys(".").to_dict()
        training = prefixed("network", weights) | prefixed("target", target) | optimizer_tensors(self.optimizer)
        return weights, {name: tensor.detach().clone() for name, tensor in training.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        if not tensors:
            return
        self.network.load_state_dict(unprefixed("network", tensors))
        target = self.loss.target_value_network_params.flatten_keys(".")
        for name, tensor in unprefixed("target", tensors).items():
            target[name].copy_(tensor)
        restore_optimizer(self.optimizer, tensors)


def _pack(data: Any) -> Any:
    """Rewards as -1, 0 or 1, as in the paper, so that one learning rate fits all games. Frames as bytes, which take a
    quarter of the memory; a pixel changes by at most 1/510."""
    data.set(("next", "reward"), data.get(("next", "reward")).sign())
    for key in ("pixels", ("next", "pixels")):
        data.set(key, (data.get(key) * 255).round().to(torch.uint8))
    return data


def _unpack(data: Any) -> Any:
    for key in ("pixels", ("next", "pixels")):
        data.set(key, data.get(key).float() / 255)
    return data
