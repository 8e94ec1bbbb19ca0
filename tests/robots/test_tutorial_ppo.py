"""TorchRL's PPO tutorial, exported as its reader would try it: the service scores what the policy scores in TorchRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import Compose, DoubleToFloat, GymEnv, ObservationNorm, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from actserve import RemotePolicy
from actserve_export import PolicySource
from tests.robots.episodes import serving_policy

NAME = "InvertedDoublePendulum-v5"
FRAMES, BATCH, EPOCHS, MINIBATCH = 20_000, 1000, 10, 64
SEEDS = range(10)


def hidden(outputs: int, *last: nn.Module) -> nn.Sequential:
    layers = [layer for _ in range(3) for layer in (nn.LazyLinear(256), nn.Tanh())]
    return nn.Sequential(*layers, nn.LazyLinear(outputs), *last)


def trained() -> tuple[Any, Any]:
    """(environment, policy) after the tutorial's loop, with fewer frames."""
    torch.manual_seed(0)
    environment = TransformedEnv(
        GymEnv(NAME), Compose(ObservationNorm(in_keys=["observation"]), DoubleToFloat(), StepCounter())
    )
    environment.set_seed(0)
    environment.transform[0].init_stats(num_iter=1000, reduce_dim=0, cat_dim=0)
    space = environment.action_spec_unbatched.space
    actor = hidden(2 * environment.action_spec.shape[-1], NormalParamExtractor())
    policy = ProbabilisticActor(
        TensorDictModule(actor, in_keys=["observation"], out_keys=["loc", "scale"]),
        spec=environment.action_spec, in_keys=["loc", "scale"], distribution_class=TanhNormal,
        distribution_kwargs={"low": space.low, "high": space.high}, return_log_prob=True,
    )  # fmt: skip
    value = ValueOperator(hidden(1), in_keys=["observation"])
    policy(environment.reset())
    value(environment.reset())
    collector = Collector(environment, policy, frames_per_batch=BATCH, total_frames=FRAMES, split_trajs=False)
    buffer = ReplayBuffer(storage=LazyTensorStorage(BATCH), sampler=SamplerWithoutReplacement())
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=value, average_gae=True)
    loss = ClipPPOLoss(actor_network=policy, critic_network=value, clip_epsilon=0.2, entropy_coeff=1e-4)
    optimizer = torch.optim.Adam(loss.parameters(), 3e-4)
    for collected in collector:
        for _ in range(EPOCHS):
            advantage(collected)
            buffer.extend(collected.reshape(-1))
            for _ in range(BATCH // MINIBATCH):
                losses = loss(buffer.sample(MINIBATCH))
                sum(losses[f"loss_{part}"] for part in ("objective", "critic", "entropy")).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    collector.shutdown()
    return environment, policy


def score_in_torchrl(environment: Any, policy: Any, seed: int) -> float:
    environment.set_seed(seed)
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        return float(environment.rollout(1000, policy)["next", "reward"].sum())


def score_over_http(client: RemotePolicy, seed: int) -> float:
    environment = gymnasium.make(NAME)
    environment.reset(seed=seed)
    seen, _ = environment.reset()  # TorchRL's seed is that of the reset before the first episode
    total, over = 0.0, False
    while not over:
        seen, reward, terminated, truncated, _ = environment.step(client.act(seen))
        total += float(reward)
        over = terminated or truncated
    return total


def test_the_policy_scores_over_http_what_it_scores_in_torchrl(tmp_path: Path) -> None:
    environment, policy = trained()
    policy.eval()
    source = PolicySource(
        TensorDictSequential(environment.transform, policy), environment.base_env.observation_spec.zero()
    )
    with serving_policy(source, tmp_path) as client:
        served = [score_over_http(client, seed) for seed in SEEDS]
    own = [score_in_torchrl(environment, policy, seed) for seed in SEEDS]
    np.testing.assert_allclose(served, own, rtol=0.01)
    assert np.mean(own) > 200, "the policy has learned nothing"  # a random one scores 50
