"""`predict` of Stable-Baselines3's policies as torch modules.

    Predict           observations, (B, *shape) each, in the order of the space
                      -> action (B, *action shape), and for discrete actions logits or action_value (B, n)
    MaskedPredict     and action_masks, (B, choices) bool, of which an action that is False is not taken
    RecurrentPredict  and hidden and cell, (B, layers, units) each, is_init (B,) bool -> and the new hidden and cell

With stacked frames each also takes the stacks of the step before and is_init, and returns the new ones.

A `Predict` first applies its `Observations` (raw observation -> the network's input), then the network, then its
`Actions` (the network's action -> the action of the environment). `Predict.original` calls the library's own `predict`
on numpy arrays, and the certificate compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, exploration_type

from actserve.core.signature import IS_INIT, Arrays
from actserve_export.sources.sb3_observations import Observations

_MASKS = "action_masks"


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
    """A policy without memory. Beside the action it returns the logits behind a choice, if any."""

    inputs: tuple[str, ...] = ()  # beside the observations
    memory: tuple[str, ...] = ()

    def __init__(self, acting: Any, observations: Observations, actions: Actions) -> None:
        super().__init__()
        self.acting = acting
        self.observations, self.actions = observations, actions
        states = [*self.memory, *observations.frames.values()]
        self.in_keys: list[Any] = [*observations.keys.values(), *self.inputs, *states]
        self.in_keys += [IS_INIT.name] if states else []
        self.out_keys: list[Any] = ["action", *(("next", name) for name in states), *self.scores()]

    def scores(self) -> list[str]:
        discrete = isinstance(self.acting.action_space, spaces.Discrete)
        return ["logits"] if discrete and hasattr(self.acting, "get_distribution") else []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.in_keys, inputs, strict=True))
        seen = {name: given[key] for name, key in self.observations.keys.items()}
        frames = {name: given[key] for name, key in self.observations.frames.items()}
        observation, stacks = self.observations(seen, frames, given.get(IS_INIT.name))
        (action, *memory), scores = self.act(observation, given)
        return (self.actions(action), *memory, *stacks.values(), *scores)

    def act(self, observation: Any, given: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """((the network's action, new memory), scores)."""
        if not hasattr(self.acting, "get_distribution"):
            return (self.acting._predict(observation, deterministic=_deterministic()),), []
        return self._choose(self.acting.get_distribution(observation))

    def _choose(self, distribution: Any) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        scores = [distribution.distribution.logits] if self.scores() else []
        return (distribution.get_actions(deterministic=_deterministic()),), scores

    def example(self) -> dict[str, Tensor]:
        """One item of every input."""
        return {name: tensor[0] for name, tensor in self.sample(1).items()} | self.observations.stacks()

    def sample(self, count: int) -> TensorDict:
        """Random observations, (count, ...) each; the same every time."""
        return self.observations.sample(count)

    def original(self, policy: Any) -> Callable[[Arrays], Arrays]:
        """`policy.predict` as a function of arrays by name, (B, *shape) each."""

        def act(inputs: Arrays) -> Arrays:
            begins = inputs[IS_INIT.name] if self.observations.frames else None
            return self.predict(policy, self.observations.prepare(inputs, begins), inputs)

        return act

    def predict(self, policy: Any, observation: Any, inputs: Arrays) -> Arrays:
        """The results of the library's own `predict`."""
        return {"action": policy.predict(observation, deterministic=True)[0]}


class ValuePredict(Predict):
    """A network that returns values (B, n), or quantiles of them (B, quantiles, n): the largest value is the action."""

    def scores(self) -> list[str]:
        return ["action_value"]

    def act(self, observation: Any, given: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        values = self.acting(observation)
        values = values if values.ndim == 2 else values.mean(1)
        return (values.argmax(1),), [values]


class MaskedPredict(Predict):
    """A policy that takes only some of its actions (`MaskablePPO`)."""

    inputs = (_MASKS,)

    def act(self, observation: Any, given: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        return self._choose(self.acting.get_distribution(observation, given[_MASKS]))

    def sample(self, count: int) -> TensorDict:
        """Also masks, (count, choices): of each choice one action is allowed, and each other one by chance."""
        observed = super().sample(count)
        rng = np.random.default_rng(1)
        masks = []
        for choices in _choices(self.acting.action_space):
            mask = rng.random((count, choices)) < 0.5
            mask[np.arange(count), rng.integers(0, choices, count)] = True
            masks.append(mask)
        return observed.set(_MASKS, torch.from_numpy(np.concatenate(masks, 1)))

    def predict(self, policy: Any, observation: Any, inputs: Arrays) -> Arrays:
        return {"action": policy.predict(observation, deterministic=True, action_masks=inputs[_MASKS])[0]}


def _choices(space: Any) -> list[int]:
    """How many actions each element of an action chooses among."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    return [2] * int(space.n) if isinstance(space, spaces.MultiBinary) else [int(count) for count in space.nvec]


class RecurrentPredict(Predict):
    """A policy with an LSTM (`RecurrentPPO`). Its state is `hidden` and `cell`."""

    memory = ("hidden", "cell")

    def act(self, observation: Any, given: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        policy = self.acting
        features = BaseModel.extract_features(policy, observation, policy.pi_features_extractor)
        kept = (~given[IS_INIT.name]).reshape(1, -1, 1).float()
        before = [(kept * given[name].transpose(0, 1)).contiguous() for name in self.memory]  # (layers, B, units)
        latent, after = policy.lstm_actor(features.unsqueeze(0), tuple(before))
        distribution = policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent.squeeze(0)))
        (action,), scores = self._choose(distribution)
        return (action, *(state.transpose(0, 1) for state in after)), scores

    def example(self) -> dict[str, Tensor]:
        layers, _, units = self.acting.lstm_hidden_state_shape
        return super().example() | {name: torch.zeros(layers, units) for name in self.memory}

    def predict(self, policy: Any, observation: Any, inputs: Arrays) -> Arrays:
        before = tuple(inputs[name].swapaxes(0, 1) for name in self.memory)
        action, after = policy.predict(observation, before, inputs[IS_INIT.name], deterministic=True)
        return {"action": action, **{f"next_{n}": x.swapaxes(0, 1) for n, x in zip(self.memory, after, strict=True)}}


def _deterministic() -> bool:
    return exploration_type() not in (ExplorationType.RANDOM, None)
