"""1,000 steps in real environments, through the service: each action is the one that the library's own policy takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gym_pusht  # noqa: F401  registers its environments
import gymnasium
import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from mpe2 import simple_spread_v3
from rsl_rl.models import RNNModel
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.overrides import TorchFunctionMode
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal

from actserve import RemotePolicy
from actserve.core.completion import draw_noise
from actserve.core.signature import Arrays
from actserve_export import PolicySource, from_lerobot, from_rsl_rl
from tests.robots.episodes import serving_policy
from tests.robots.test_lerobot import made

STEPS = 1000
ATOL = 1e-3  # of actions in the units of the environment, 0 to 512 in PushT


class Served:
    """A policy behind a service, and what its client keeps: the state, and a seed for each step."""

    def __init__(self, client: RemotePolicy) -> None:
        self._client = client
        self.signature = client.signature
        self._state: Arrays = {}
        self._seed = 0

    def begin(self) -> None:
        self._state = {}

    def act(self, observed: Mapping[str, Any]) -> tuple[Any, list[Any]]:
        """(the action, the numbers that it was drawn with)."""
        self._seed += 1
        drawn = self.signature.draws(self.signature.exploration[0])
        answer = self._client.step({**observed, **self._state}, seed=self._seed if drawn else None)
        self._state = {entry.spec.name: answer[entry.spec.name] for entry in self.signature.state}
        noise = draw_noise(self.signature.noise, self._seed, 1) if drawn else {}
        return answer[self.signature.action.name], [torch.from_numpy(array) for array in noise.values()]


@contextmanager
def served(source: PolicySource, folder: Path) -> Iterator[Served]:
    with serving_policy(source, folder) as client:
        yield Served(client)


class Given(TorchFunctionMode):
    """Makes `torch.randn` return the given numbers, one after the other."""

    def __init__(self, noise: list[Any]) -> None:
        super().__init__()
        self._noise = iter(noise)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return next(self._noise) if func is torch.randn else func(*args, **(kwargs or {}))


Step = Callable[[Any], tuple[Any, bool]]  # action -> (observation, whether the episode is over)


def play(
    served: Served,
    reset: Callable[[], Any],
    step: Step,
    observed: Callable[[Any], dict[str, Any]],
    begins: Callable[[], None],
    act: Callable[[dict[str, Any]], Any],
) -> int:
    """Play `STEPS` steps with the actions of the service -> episodes. `begins` and `act` are the library's policy."""
    episodes = 0
    over, seen = True, None
    actions = []
    for _ in range(STEPS):
        if over:
            seen = reset()
            served.begin()
            begins()
            episodes += 1
        named = observed(seen)
        action, noise = served.act(named)
        with torch.no_grad(), Given(noise):
            expected = act({name: torch.as_tensor(array).unsqueeze(0) for name, array in named.items()})
        np.testing.assert_allclose(action, expected[0].numpy(), rtol=1e-4, atol=ATOL)
        actions.append(action)
        seen, over = step(action)
    assert len(np.unique(np.stack(actions), axis=0)) > STEPS / 10, "or it proves little"
    return episodes


def played(served: Served, environment: Any, observed: Any, begins: Any, act: Any) -> int:
    """`play` in an environment of Gymnasium."""
    seeds = iter(range(STEPS))

    def reset() -> Any:
        return environment.reset(seed=next(seeds))[0]

    def step(action: Any) -> tuple[Any, bool]:
        low, high = environment.action_space.low, environment.action_space.high
        seen, _, terminated, truncated, _ = environment.step(np.clip(action, low, high))
        return seen, terminated or truncated

    return play(served, reset, step, observed, begins, act)


AGENT = {"observation.state": PolicyFeature(FeatureType.STATE, (2,))}
KEYPOINTS = {"observation.environment_state": PolicyFeature(FeatureType.ENV, (16,))}
SCREEN = {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96))}
TARGET = {"action": PolicyFeature(FeatureType.ACTION, (2,))}


def with_keypoints(seen: Any) -> dict[str, Any]:
    return {
        "observation.state": seen["agent_pos"].astype(np.float32),
        "observation.environment_state": seen["environment_state"].astype(np.float32),
    }


def with_screen(seen: Any) -> dict[str, Any]:
    return {"observation.state": seen["agent_pos"].astype(np.float32), "observation.image": seen["pixels"]}


def act_policy() -> tuple[Any, ...]:
    configuration = ACTConfig(
        input_features=AGENT | SCREEN, output_features=TARGET, chunk_size=20, n_action_steps=10, dim_model=64,
        n_heads=4, dim_feedforward=64, n_encoder_layers=2, n_vae_encoder_layers=1, pretrained_backbone_weights=None,
        device="cpu",
    )  # fmt: skip
    return made(ACTPolicy, configuration)


def diffusion_policy() -> tuple[Any, ...]:
    configuration = DiffusionConfig(
        input_features=AGENT | KEYPOINTS, output_features=TARGET, horizon=16, n_action_steps=8, down_dims=(16, 32),
        diffusion_step_embed_dim=16, n_groups=4, num_train_timesteps=100, num_inference_steps=3,
        noise_scheduler_type="DDIM", device="cpu",
    )  # fmt: skip
    return made(DiffusionPolicy, configuration)


@pytest.mark.parametrize(
    ("policy", "observation", "observed"),
    [
        (act_policy, "pixels_agent_pos", with_screen),
        (diffusion_policy, "environment_state_agent_pos", with_keypoints),
    ],
    ids=["ACT", "Diffusion"],
)
def test_a_policy_of_lerobot_plays_pusht(policy: Any, observation: str, observed: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, preprocess, postprocess = policy()
    cameras = "observation.image" in model.config.input_features

    def act(seen: dict[str, Any]) -> Any:
        if cameras:
            seen = {**seen, "observation.image": seen["observation.image"].permute(0, 3, 1, 2).float() / 255}
        return postprocess(model.select_action(preprocess(seen)))

    source = from_lerobot(model, preprocess, postprocess, channels_last=cameras)
    environment = gymnasium.make("gym_pusht/PushT-v0", obs_type=observation, max_episode_steps=250)
    with served(source, tmp_path) as service:
        assert played(service, environment, observed, model.reset, act) == 4


def test_an_lstm_of_rsl_rl_swings_a_pendulum(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = TensorDict({"policy": torch.zeros(1, 3)}, batch_size=[1])
    model = RNNModel(
        example, {"actor": ["policy"]}, "actor", 1, hidden_dims=[32], obs_normalization=True, rnn_type="lstm",
        rnn_hidden_dim=16, distribution_cfg={"class_name": "GaussianDistribution", "init_std": 0.5},
    )  # fmt: skip
    model.update_normalization(TensorDict({"policy": torch.randn(64, 3)}, batch_size=[64]))
    source = from_rsl_rl(model, example)
    model.eval()

    def act(seen: dict[str, Any]) -> Any:
        return model(TensorDict(seen, batch_size=1))

    def observed(seen: Any) -> dict[str, Any]:
        return {"policy": seen}

    with served(source, tmp_path) as service:
        assert played(service, gymnasium.make("Pendulum-v1"), observed, model.reset, act) == 5


def test_agents_of_mappo_spread_over_landmarks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    environment = simple_spread_v3.parallel_env(continuous_actions=True, max_cycles=50)
    environment.reset(seed=0)
    agents = environment.possible_agents
    (width,) = environment.observation_space(agents[0]).shape
    (actions,) = environment.action_space(agents[0]).shape
    network = MultiAgentMLP(
        n_agent_inputs=width, n_agent_outputs=2 * actions, n_agents=len(agents), centralized=False, share_params=True,
        depth=2, num_cells=32, activation_class=nn.Tanh,
    )  # fmt: skip
    heads = TensorDictModule(
        nn.Sequential(network, Scaled()), in_keys=[("agents", "observation")],
        out_keys=[("agents", "loc"), ("agents", "scale")],
    )  # fmt: skip
    policy = ProbabilisticActor(
        heads, in_keys=[("agents", "loc"), ("agents", "scale")], out_keys=[("agents", "action")],
        distribution_class=TanhNormal, distribution_kwargs={"low": 0.0, "high": 1.0}, return_log_prob=True,
        log_prob_key=("agents", "log_prob"),
    )  # fmt: skip
    source = PolicySource(
        policy,
        TensorDict({"agents": TensorDict({"observation": torch.zeros(len(agents), width)}, [len(agents)])}),
        exploration=("deterministic",),
    )
    seeds = iter(range(STEPS))

    def reset() -> Any:
        return environment.reset(seed=next(seeds))[0]

    def step(action: Any) -> tuple[Any, bool]:
        seen, _, terminated, truncated, _ = environment.step(dict(zip(agents, action, strict=True)))
        return seen, not environment.agents or any(terminated.values()) or any(truncated.values())

    def observed(seen: Any) -> dict[str, Any]:
        return {"agents_observation": np.stack([seen[agent] for agent in agents]).astype(np.float32)}

    def act(seen: dict[str, Any]) -> Any:
        given = TensorDict({"agents": TensorDict({"observation": seen["agents_observation"]}, [1, len(agents)])}, [1])
        return policy(given)["agents", "action"]

    with served(source, tmp_path) as service:
        assert play(service, reset, step, observed, lambda: None, act) == STEPS // 50


class Scaled(nn.Module):
    """(..., 2 n) -> location and positive scale, (..., n) each."""

    def forward(self, both: Any) -> Any:
        location, scale = both.chunk(2, -1)
        return location, nn.functional.softplus(scale) + 1e-3
