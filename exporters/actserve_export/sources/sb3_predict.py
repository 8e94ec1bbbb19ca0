"""`predict` of Stable-Baselines3's policies as torch modules.

    Predict           observations, (B, *shape) each, in the order of the space
                      -> action (B, *action shape), and for discrete actions logits or action_value (B, n)
    RecurrentPredict  observations, hidden and cell (B, layers, units) each, is_init (B,) bool
                      -> action, the new hidden and cell, and logits as above

A `Predict` first applies its `Observations` (raw observation -> the network's input), then the network, then its
`Actions` (the network's action -> the action of the environment). `Predict.original` calls the library's own `predict`
on numpy arrays, and the certificate compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecNormalize
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import Bounded, Composite
from torchrl.envs.utils import ExplorationType, exploration_type

from actserve.core.errors import CaptureFailed
from actserve.core.signature import IS_INIT, Array, Arrays

_OBSERVATION = "observation"
_FAR = 1e6  # a bound beyond this counts as no bound


class Observations(nn.Module):
    """The preprocessing before the policy's own: `VecNormalize`, then images from (H, W, C) to (C, H, W)."""

    def __init__(self, space: spaces.Space[Any], statistics: VecNormalize | None, channels_last: bool) -> None:
        super().__init__()
        self.by_name = isinstance(space, spaces.Dict)
        self.spaces: dict[str, Any] = dict(space.spaces) if isinstance(space, spaces.Dict) else {_OBSERVATION: space}
        self.channels_last_keys = [
            name for name, space in self.spaces.items() if channels_last and is_image_space(space)
        ]
        # A function, because a VecNormalize that was read from a file cannot be copied, and modules are.
        self.normalize_obs = None if statistics is None else (lambda given: statistics.normalize_obs(given))
        self.normalized: list[str] = []
        if statistics is None or not statistics.norm_obs:
            return
        self.normalized = list(statistics.norm_obs_keys or self.spaces)
        self.limit = float(statistics.clip_obs)
        for name in self.normalized:
            found = statistics.obs_rms[name] if self.by_name else statistics.obs_rms
            # As VecNormalize computes: in float64, and only then as float32.
            self.register_buffer(f"mean_{name}", torch.from_numpy(found.mean))
            self.register_buffer(f"std_{name}", torch.from_numpy(np.sqrt(found.var + statistics.epsilon)))

    def forward(self, *inputs: Tensor) -> Any:
        """(B, *shape) each -> the policy's observation: a tensor, or tensors by name."""
        given = dict(zip(self.spaces, inputs, strict=True))
        for name in self.normalized:
            scaled = (given[name].double() - self.get_buffer(f"mean_{name}")) / self.get_buffer(f"std_{name}")
            given[name] = scaled.clamp(-self.limit, self.limit).float()
        for name in self.channels_last_keys:
            given[name] = given[name].permute(0, 3, 1, 2)
        return given if self.by_name else given[_OBSERVATION]

    def prepare(self, inputs: Arrays) -> Any:
        """The same with the library's own code, on numpy arrays."""
        given: Any = {name: inputs[name] for name in self.spaces} if self.by_name else inputs[_OBSERVATION]
        if self.normalize_obs is not None:
            given = self.normalize_obs(given)
        if not self.by_name:
            return np.moveaxis(given, -1, 1) if self.channels_last_keys else given
        return given | {name: np.moveaxis(given[name], -1, 1) for name in self.channels_last_keys}

    def sample(self, count: int) -> TensorDict:
        """Random observations, (count, ...) each; the same every time."""
        drawn = {name: torch.from_numpy(self._sample(name, count)) for name in self.spaces}
        return TensorDict(drawn, batch_size=[count])

    def spec(self) -> Composite:
        """The bounds of numbers that the policy encodes as one-hot vectors."""
        found = {name: _index_bounds(space) for name, space in self.spaces.items()}
        return Composite(
            {name: Bounded(*each, shape=each[0].shape, dtype=torch.int64) for name, each in found.items() if each}
        )

    def _sample(self, name: str, count: int) -> Array:
        space = self.spaces[name]
        if name in self.normalized:
            mean, std = (self.get_buffer(f"{what}_{name}").numpy() for what in ("mean", "std"))
            values = mean + std * np.random.default_rng(0).standard_normal((count, *mean.shape))
        else:
            bounded = _bounded(space)
            bounded.seed(0)
            values = np.stack([bounded.sample() for _ in range(count)])
            if (limits := _index_bounds(space)) is not None:
                values = values.clip(*(limit.numpy() for limit in limits))
            if is_image_space(space):  # of different brightness: plain noise always has the same mean
                values = values * np.random.default_rng(0).random((count, 1, 1, 1))
            values = np.moveaxis(values, 1, -1) if name in self.channels_last_keys else values
        return np.ascontiguousarray(values.astype(_dtype(space)))


def _bounded(space: Any) -> Any:
    """A copy of a space without huge bounds, so that sampling it gives values of ordinary size."""
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        return deepcopy(space)
    low, high = np.where(space.low < -_FAR, -np.inf, space.low), np.where(space.high > _FAR, np.inf, space.high)
    return spaces.Box(low.astype(space.dtype), high.astype(space.dtype), dtype=space.dtype)


def _index_bounds(space: Any) -> tuple[Tensor, Tensor] | None:
    """The lowest and highest values of a discrete space that the policy takes, (*shape) each; None for others.

    Stable-Baselines3 encodes a value as a one-hot vector of n, whatever the `start` of the space is.
    """
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return None
    count = np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec, np.int64)
    start = np.asarray(space.start, np.int64)
    low, high = np.maximum(start, 0), count - 1 + np.minimum(start, 0)
    if (low > high).any():
        raise CaptureFailed(
            f"the observation space {space} starts at {space.start}, and Stable-Baselines3 takes values below {count} "
            "only; train with a space that starts at 0"
        )
    return torch.as_tensor(low), torch.as_tensor(high)


def _dtype(space: Any) -> str:
    """The dtype that a client sends."""
    found = np.dtype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return "bool"
    if found.name in ("uint8", "int32", "int64", "float32", "float64", "bool"):
        return str(found.name)
    return "float32" if found.kind == "f" else "int32"


class Actions(nn.Module):
    """The network's action -> the action of the environment: clipped to the space, or scaled to it from -1..1."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.shape = policy.action_space.shape
        self.bounded = isinstance(policy.action_space, spaces.Box)
        self.squashed = policy.squash_output
        if self.bounded:
            self.register_buffer("low", torch.from_numpy(policy.action_space.low))
            self.register_buffer("high", torch.from_numpy(policy.action_space.high))

    def forward(self, action: Tensor) -> Tensor:
        action = action.reshape(-1, *self.shape)
        if not self.bounded:
            return action
        low, high = self.get_buffer("low"), self.get_buffer("high")
        if self.squashed:
            return low + (0.5 * (action + 1.0) * (high - low))
        return torch.maximum(torch.minimum(action, high), low)


class Predict(nn.Module):
    """A policy without memory. Besides the action it returns the logits or action values behind the choice, if any."""

    def __init__(self, acting: Any, observations: Observations, actions: Actions) -> None:
        super().__init__()
        self.acting = acting
        self.observations, self.actions = observations, actions
        self.in_keys: list[Any] = list(observations.spaces)
        self.out_keys: list[Any] = ["action", *self._scores()]

    def _scores(self) -> list[str]:
        if isinstance(self.acting, ActorCriticPolicy):
            return ["logits"] if isinstance(self.acting.action_space, spaces.Discrete) else []
        return ["action_value"] if isinstance(self.acting.action_space, spaces.Discrete) else []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        observation = self.observations(*inputs)
        if isinstance(self.acting, ActorCriticPolicy):
            return self._choose(self.acting.get_distribution(observation))
        if self._scores():  # a QNetwork returns values (B, n), a QuantileNetwork quantiles of them (B, quantiles, n)
            values = self.acting(observation)
            values = values if values.ndim == 2 else values.mean(1)
            return self.actions(values.argmax(1)), values
        return (self.actions(self.acting._predict(observation, deterministic=_deterministic())),)

    def _choose(self, distribution: Any) -> tuple[Tensor, ...]:
        action = self.actions(distribution.get_actions(deterministic=_deterministic()))
        return (action, distribution.distribution.logits) if self._scores() else (action,)

    def example(self) -> dict[str, Tensor]:
        """One item of every input."""
        return {name: tensor[0] for name, tensor in self.observations.sample(1).items()}

    def original(self, policy: Any) -> Callable[[Arrays], Arrays]:
        """`policy.predict` as a function of arrays by name, (B, *shape) each."""

        def act(inputs: Arrays) -> Arrays:
            action, _ = policy.predict(self.observations.prepare(inputs), deterministic=True)
            return {"action": action}

        return act


class RecurrentPredict(Predict):
    """A policy with an LSTM (`RecurrentPPO`). Its state is `hidden` and `cell`."""

    def __init__(self, acting: Any, observations: Observations, actions: Actions) -> None:
        super().__init__(acting, observations, actions)
        self.in_keys += ["hidden", "cell", IS_INIT.name]
        self.out_keys[1:1] = [("next", "hidden"), ("next", "cell")]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *seen, hidden, cell, is_init = inputs
        policy = self.acting
        features = BaseModel.extract_features(policy, self.observations(*seen), policy.pi_features_extractor)
        kept = (~is_init).reshape(1, -1, 1).float()
        before = [(kept * state.transpose(0, 1)).contiguous() for state in (hidden, cell)]  # (layers, B, units)
        latent, after = policy.lstm_actor(features.unsqueeze(0), tuple(before))
        distribution = policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent.squeeze(0)))
        action, *scores = self._choose(distribution)
        return (action, *(state.transpose(0, 1) for state in after), *scores)

    def example(self) -> dict[str, Tensor]:
        layers, _, units = self.acting.lstm_hidden_state_shape
        return super().example() | {name: torch.zeros(layers, units) for name in ("hidden", "cell")}

    def original(self, policy: Any) -> Callable[[Arrays], Arrays]:
        def act(inputs: Arrays) -> Arrays:
            before = tuple(inputs[name].swapaxes(0, 1) for name in ("hidden", "cell"))
            action, after = policy.predict(
                self.observations.prepare(inputs), before, inputs[IS_INIT.name], deterministic=True
            )
            hidden, cell = (state.swapaxes(0, 1) for state in after)
            return {"action": action, "next_hidden": hidden, "next_cell": cell}

        return act


def _deterministic() -> bool:
    return exploration_type() not in (ExplorationType.RANDOM, None)
