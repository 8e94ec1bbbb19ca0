"""rl_games' players -> PolicySource: `player.get_action` as a function of tensors.

Players are recognised by their attributes, and rl_games is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from actserve.core.environment import Contract
from actserve.core.errors import CaptureFailed
from actserve_export.sources.library_actor import RecurrentActor, Tensors, WithoutDraws, fresh_copy, titled
from actserve_export.sources.policy_source import PolicySource

_OBSERVATION, _MASKS = "observation", "action_masks"
_MEMORY = {"lstm": ("hidden", "cell", "critic_hidden", "critic_cell"), "gru": ("hidden", "critic_hidden")}
_LIMIT = 5.0  # of a normalised observation


def from_rl_games(player: Any, *, masks: bool = False, environment: Contract | None = None) -> PolicySource:
    """The player of rl_games, acting as `player.get_action(observation, is_deterministic=True)`, or at random.

    `player` is what `runner.create_player()` returns, after `player.restore(checkpoint)`. Observations are as its
    environment gives them: images uint8 are divided by 255 here. The state of an RNN is `hidden` and `cell`; with a
    separate critic also `critic_hidden` and `critic_cell`, because the network steps both.
    `masks`: the artifact takes `action_masks`, (actions,) bool, as `player.get_masked_action` does.
    Raises `CaptureFailed` for anything else.
    """
    if not isinstance(getattr(player, "model", None), nn.Module) or not hasattr(player, "get_action"):
        raise CaptureFailed(
            f"expected a player of rl_games, such as runner.create_player(); got a {type(player).__name__}"
        )
    return _Actor(player, masks).source(titled("rl_games", "rl-games"), "get_action", environment)


class _Actor(RecurrentActor):
    def __init__(self, player: Any, masks: bool) -> None:
        space = player.observation_space
        named = dict(space.spaces) if isinstance(space, spaces.Dict) else {_OBSERVATION: space}
        observations = {name: torch.zeros(part.shape, dtype=_dtype(part)) for name, part in named.items()}
        if masks:
            observations[_MASKS] = torch.ones(int(np.sum(player.actions_num)), dtype=torch.bool)
        super().__init__(observations, _memory(player.model))
        self.by_name = isinstance(space, spaces.Dict)
        self.model = _plain_copy(player.model)
        self.continuous = isinstance(player.action_space, spaces.Box)
        if self.continuous:
            self.register_buffer("low", torch.as_tensor(player.action_space.low, dtype=torch.float32))
            self.register_buffer("high", torch.as_tensor(player.action_space.high, dtype=torch.float32))
        self.scaled = bool(player.clip_actions)
        self.range = getattr(player, "action_range", None)  # SAC's
        # A function, because a player may hold an environment, which cannot be copied, and modules are.
        self.player: Callable[[], Any] = lambda: player

    def run(self, seen: Tensors, memory: list[Tensor], deterministic: bool) -> tuple[Any, ...]:
        given = {name: tensor for name, tensor in seen.items() if name != _MASKS}
        given = {name: x.float() / 255 if x.dtype == torch.uint8 else x for name, x in given.items()}
        observation = given if self.by_name else given[_OBSERVATION]
        if self.range is not None:
            distribution = self.model.actor(self.model.norm_obs(observation))
            action = distribution.mean if deterministic else distribution.sample()
            return action.clamp(*self.range), []
        inputs = {"is_train": False, "prev_actions": None, "obs": observation, "rnn_states": memory or None}
        if _MASKS in seen:
            inputs["action_masks"] = seen[_MASKS]
        if deterministic:
            with WithoutDraws():
                found = self.model(inputs)
        else:
            found = self.model(inputs)
        after = list(found["rnn_states"]) if memory else []
        if self.continuous:
            return self._scaled(found["mus"] if deterministic else found["actions"]), after
        if not deterministic:
            return found["actions"], after
        if isinstance(found["logits"], list):
            return torch.stack([logits.argmax(-1) for logits in found["logits"]], -1), after
        return found["logits"].argmax(-1), after

    def _scaled(self, action: Tensor) -> Tensor:
        if not self.scaled:
            return action
        low, high = self.get_buffer("low"), self.get_buffer("high")
        return action.clamp(-1.0, 1.0) * ((high - low) / 2.0) + (high + low) / 2.0

    def run_library(self, seen: Tensors, memory: list[Tensor], begins: Tensor) -> tuple[Tensor, list[Tensor]]:
        player = self.player()
        before = player.states, player.has_batch_dimension
        for tensor in memory:
            tensor[:, begins] = 0
        player.states, player.has_batch_dimension = [tensor.to(player.device) for tensor in memory] or None, True
        try:
            given: Any = {name: x.to(player.device) for name, x in seen.items() if name != _MASKS}
            given = given if self.by_name else given[_OBSERVATION]
            if _MASKS in seen:
                action = player.get_masked_action(given, seen[_MASKS], is_deterministic=True)
            else:
                action = player.get_action(given, is_deterministic=True)
            after = [tensor.cpu() for tensor in player.states] if memory else []
        finally:
            player.states, player.has_batch_dimension = before
        return action.cpu().reshape(len(begins), *player.action_space.shape or self._choices(player)), after

    def _choices(self, player: Any) -> tuple[int, ...]:
        """The shape of a discrete action: () for one choice."""
        return () if isinstance(player.action_space, spaces.Discrete) else (len(player.actions_num),)


def _memory(model: Any) -> dict[str, tuple[int, int]]:
    """(layers, units) of each tensor that the network's RNNs carry."""
    if not model.is_rnn():
        return {}
    network, states = model.a2c_network, model.get_default_rnn_state()
    names = _MEMORY.get(network.rnn_name)
    if names is None:
        raise CaptureFailed(f"expected an LSTM or a GRU; the network has a {network.rnn_name}")
    return {name: (int(state.shape[0]), int(state.shape[2])) for name, state in zip(names, states, strict=False)}


def _plain_copy(model: nn.Module) -> Any:
    """A copy whose statistics, which rl_games compiles with TorchScript, are modules that can be traced."""
    copied = fresh_copy(model)
    for name, child in copied.named_children():
        if isinstance(child, torch.jit.ScriptModule):
            setattr(copied, name, _plain_statistics(child))
    return copied


def _plain_statistics(scripted: Any) -> nn.Module:
    by_name = getattr(scripted, "running_mean_std", None)
    if by_name is not None:
        return _StatisticsByName({name: _Statistics(part) for name, part in by_name.named_children()})
    return _Statistics(scripted)


class _Statistics(nn.Module):
    """`RunningMeanStd`, frozen."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        mean, std = original.running_mean.float(), torch.sqrt(original.running_var.float() + original.epsilon)
        axes = len(original.insize) - 1 if original.per_channel else 0  # after the channel
        self.register_buffer("mean", mean.reshape(*mean.shape, *[1] * axes))
        self.register_buffer("std", std.reshape(*std.shape, *[1] * axes))
        self.norm_only = bool(original.norm_only)

    def forward(self, value: Tensor, denorm: bool = False) -> Tensor:
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        if denorm:
            return std * value.clamp(-_LIMIT, _LIMIT) + mean
        return value / std if self.norm_only else ((value - mean) / std).clamp(-_LIMIT, _LIMIT)


class _StatisticsByName(nn.Module):
    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, given: Tensors) -> Tensors:
        return {name: self.parts[name](tensor) for name, tensor in given.items()}


def _dtype(space: Any) -> torch.dtype:
    return torch.uint8 if space.dtype == np.uint8 else torch.float32
