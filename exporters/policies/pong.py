"""`pong`: the tutorial's DQN on Atari Pong. One raw RGB screen in, an action and the six action values out."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ale_py import ALEInterface, LoggerMode
from safetensors.torch import load_file
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Categorical, LazyTensorStorage, ReplayBuffer
from torchrl.envs import Compose, GrayScale, GymEnv, StepCounter, ToTensorImage, Transform, TransformedEnv
from torchrl.modules import ConvNet, EGreedyModule, QValueModule
from torchrl.objectives import DQNLoss, SoftUpdate

from app.environment import Environment, GameAction
from exporters.policies.transforms import NearestResize
from exporters.source import PolicySource
from exporters.train import Run, optimizer_tensors, prefixed, progress_bar, restore_optimizer, unprefixed

CHECKPOINT = Path(__file__).with_suffix(".safetensors")
SCREEN = (210, 160, 3)
ACTIONS = ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
CODES = (0, 1, 3, 4, 11, 12)


def environment() -> Environment:
    """Pong as Gymnasium's v5 plays it: frame skip 4, sticky actions, the minimal action set."""
    actions = tuple(GameAction(meaning, code) for meaning, code in zip(ACTIONS, CODES, strict=True))
    return Environment("ALE/Pong-v5", "pong", "pixels", actions)


def preprocessing(*more: Transform) -> Compose:
    """(..., 210, 160, 3) uint8 -> (..., 1, 84, 84) float32 in 0..1, as the tutorial does it; then `more`."""
    return Compose(ToTensorImage(in_keys=["pixels"]), NearestResize(84, 84), GrayScale(in_keys=["pixels"]), *more)


def make_env() -> TransformedEnv:
    """The training environment: `pixels` are what `preprocessing` gives."""
    game = GymEnv("ALE/Pong-v5", categorical_action_encoding=True)
    return TransformedEnv(game, preprocessing(StepCounter()))


def value_network() -> nn.Module:
    """The Nature CNN (Mnih et al. 2015), (B, 1, 84, 84) -> (B, 6), with its lazy layers made."""
    network = ConvNet.default_atari_dqn(num_actions=len(ACTIONS))
    with torch.no_grad():
        network(torch.zeros(1, 1, 84, 84))
    return network


def greedy(network: nn.Module) -> TensorDictSequential:
    """pixels -> action_value, action."""
    values = TensorDictModule(network, in_keys=["pixels"], out_keys=["action_value"])
    return TensorDictSequential(values, QValueModule(spec=Categorical(len(ACTIONS))))


def pong() -> PolicySource:
    """The bundled policy, with the weights that ship, taking raw screens."""
    network = value_network()
    network.load_state_dict(load_file(CHECKPOINT))
    network.requires_grad_(False)
    return PolicySource(
        policy=TensorDictSequential(preprocessing(), greedy(network)),
        example=TensorDict({"pixels": torch.zeros(SCREEN, dtype=torch.uint8)}),
        outputs=("action", "action_value"),
        observe=lambda count: observe(network, count),
        environment=environment(),
        weights=network,
    )


def observe(network: nn.Module, count: int, games: int = 4) -> TensorDict:
    """`count` real screens, (count, 210, 160, 3) uint8, from several seeded games, half of the actions random.

    At most every third screen of a game is taken, so that they spread over play, and none twice: a weak policy's games
    look alike. The same count gives the same screens.
    """
    ALEInterface.setLoggerMode(LoggerMode.Error)  # no banner among the export's steps
    policy, resize = greedy(network), preprocessing()
    generator = torch.Generator().manual_seed(0)
    screens: dict[bytes, torch.Tensor] = {}
    for seed in range(games):
        game = GymEnv("ALE/Pong-v5", categorical_action_encoding=True)
        game.set_seed(seed)
        state = game.reset()
        wanted = (count * (seed + 1)) // games
        step = 0
        while len(screens) < wanted:
            if step % 3 == 0:
                screens.setdefault(state["pixels"].numpy().tobytes(), state["pixels"].clone())
            state = game.step_mdp(game.step(_choose(policy, resize, state, generator)))
            if state["done"].any():
                state = game.reset()
            step += 1
        game.close()
    return TensorDict({"pixels": torch.stack(list(screens.values()))}, batch_size=[count])


def _choose(policy: nn.Module, resize: nn.Module, state: Any, generator: torch.Generator) -> Any:
    if torch.rand((), generator=generator) < 0.5:
        return state.set("action", torch.randint(len(ACTIONS), (), generator=generator))
    with torch.no_grad():
        seen = resize(state.select("pixels").clone())
        return state.set("action", policy(seen)["action"])


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


def train(run: Run, seed: int, recipe: Recipe | None = None) -> None:
    """Double DQN with TorchRL's parts, into `run`; goes on from its checkpoint if there is one."""
    recipe = recipe or Recipe()
    torch.manual_seed(seed)
    learner = _Learner(recipe)
    learner.restore(run.restore())
    total = run.total_frames or recipe.total_frames
    remaining = total - int(run.counters["frames"])
    if remaining <= 0:
        return
    learner.explore.eps.fill_(_epsilon(recipe, int(run.counters["frames"])))
    env = make_env()
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
        task = bar.add_task("pong", total=total, completed=int(run.counters["frames"]))
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
            bar.update(task, completed=frames, description=f"pong  {frames:,} steps  mean return {mean:+.1f}")
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

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.network = value_network()
        self.policy = greedy(self.network)
        self.explore = EGreedyModule(
            Categorical(len(ACTIONS)),
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
        """Keep a batch of steps, then update; returns the last loss, or 0 while warming up."""
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
        """(weights, everything that going on needs)."""
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
    """Frames as bytes: a quarter of the memory; 1/510 is the most that a pixel moves."""
    for key in ("pixels", ("next", "pixels")):
        data.set(key, (data.get(key) * 255).round().to(torch.uint8))
    return data


def _unpack(data: Any) -> Any:
    for key in ("pixels", ("next", "pixels")):
        data.set(key, data.get(key).float() / 255)
    return data
