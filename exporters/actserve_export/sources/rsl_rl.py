"""rsl_rl's actors -> PolicySource: the inference policy of a runner as a function of tensors.

rsl_rl 4 and 5 have one model for the actor (`MLPModel`, `RNNModel`, `CNNModel`), 2 and 3 an `ActorCritic` or a
`StudentTeacher`. They are recognised by their methods, and rsl_rl is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from actserve.core.environment import Contract
from actserve.core.errors import CaptureFailed
from actserve_export.sources.library_actor import (
    Examples,
    RecurrentActor,
    Tensors,
    fresh_copy,
    one_item,
    restored,
    titled,
)
from actserve_export.sources.policy_source import PolicySource

_MEMORIES = ("rnn", "memory_a", "memory_s")  # of the actor or student
_HIDDEN = ("hidden_state", "hidden_states")  # of a memory
_LSTM, _GRU = ("hidden", "cell"), ("hidden",)


def from_rsl_rl(
    policy: Any,
    observations: Examples | None = None,
    *,
    normalizer: nn.Module | None = None,
    environment: Contract | None = None,
) -> PolicySource:
    """The actor of rsl_rl, acting as `runner.get_inference_policy()` does, or in random mode as in training.

    An actor with a Beta distribution has no random mode.

    `policy` is an `OnPolicyRunner`, or the actor: what `get_inference_policy()` or `runner.alg.get_policy()` returns.
    The hidden state of an LSTM or GRU is state, `hidden` and `cell`, (layers, units) each.
    `observations` are the groups by name, one item or a batch of each, such as `env.get_observations()`. They are
    needed only if the actor reads more than one group, and `policy` is not a runner.
    `normalizer` is the runner's `obs_normalizer` of rsl_rl 2; the one of a runner is found without it.
    Raises `CaptureFailed` for anything else.
    """
    if hasattr(policy, "alg"):
        runner = policy
        found = getattr(runner.alg, "get_policy", lambda: getattr(runner.alg, "policy", None))()
        if observations is None and hasattr(getattr(runner, "env", None), "get_observations"):
            observations = _grouped(runner.env.get_observations())
        if normalizer is None and getattr(runner, "empirical_normalization", False):
            normalizer = runner.obs_normalizer
        policy = found
    policy = getattr(policy, "__self__", policy)  # of `act_inference`
    if not isinstance(policy, nn.Module) or not (hasattr(policy, "act_inference") or hasattr(policy, "get_latent")):
        raise CaptureFailed(
            f"expected a runner or an actor of rsl_rl, such as runner.get_inference_policy(); got a "
            f"{type(policy).__name__}"
        )
    actor = _Actor(policy, observations, normalizer)
    return actor.source(titled("rsl_rl", "rsl-rl-lib"), "the inference policy", environment)


class _Actor(RecurrentActor):
    def __init__(self, policy: nn.Module, observations: Examples | None, normalizer: nn.Module | None) -> None:
        model = fresh_copy(policy)
        example = _example(model, observations)
        remembering = next((getattr(model, name) for name in _MEMORIES if hasattr(model, name)), None)
        shapes = {}
        if remembering is not None:
            cell = remembering.rnn
            shapes = dict.fromkeys(_LSTM if isinstance(cell, nn.LSTM) else _GRU, (cell.num_layers, cell.hidden_size))
        super().__init__(example, shapes)
        self.model, self.remembering = model, remembering
        self.normalizer = None if normalizer is None else fresh_copy(normalizer)
        distribution = getattr(model, "distribution", None)
        self.distribution = distribution if isinstance(distribution, nn.Module) else None
        self.samples = "BetaDistribution" not in [kind.__name__ for kind in type(distribution).__mro__]
        model.reset()

    def run(self, seen: Tensors, memory: list[Tensor], deterministic: bool) -> tuple[Any, ...]:
        deterministic = deterministic or not self.samples
        with restored(self.remembering, self.distribution or self.model):
            self._remember(memory)
            given = self._given(seen)
            if hasattr(self.model, "act_inference"):
                action = self.model.act_inference(given) if deterministic else self.model.act(given)
            else:
                action = self.model(given, stochastic_output=not deterministic)
            return action, self._remembered()

    def run_library(self, seen: Tensors, memory: list[Tensor], begins: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.model.reset()
        self._remember([tensor.clone() for tensor in memory])
        self.model.reset(begins)
        given = self._given(TensorDict(seen, batch_size=[len(begins)]))
        action = getattr(self.model, "act_inference", self.model)(given)
        after = [tensor.clone() for tensor in self._remembered()]
        self.model.reset()
        return action, after

    def _given(self, seen: Any) -> Any:
        """What the model takes: the groups by name, or in rsl_rl 2, the only one."""
        if self.observations != [_ONLY]:
            return seen
        return seen[_ONLY] if self.normalizer is None else self.normalizer(seen[_ONLY])

    def _remember(self, memory: list[Tensor]) -> None:
        if self.remembering is not None:
            setattr(self.remembering, self._hidden, tuple(memory) if len(memory) > 1 else memory[0])

    def _remembered(self) -> list[Tensor]:
        if self.remembering is None:
            return []
        after = getattr(self.remembering, self._hidden)
        return list(after) if isinstance(after, tuple) else [after]

    @property
    def _hidden(self) -> str:
        return next(name for name in _HIDDEN if hasattr(self.remembering, name))


_ONLY = "observation"  # the name of rsl_rl 2's observation, which has no groups


def _grouped(observations: Any) -> Any:
    """The groups of a runner's environment, or None: rsl_rl 2 returns a tensor and further information."""
    return observations if isinstance(observations, Mapping) or hasattr(observations, "batch_size") else None


def _example(model: Any, observations: Examples | None) -> dict[str, Tensor]:
    """One item of each group that the actor reads."""
    groups = getattr(model, "obs_groups", [_ONLY])
    vectors = list(groups["policy"] if isinstance(groups, Mapping) else groups)
    images = list(getattr(model, "obs_groups_2d", getattr(model, "actor_obs_groups_2d", [])))
    vectors = [name for name in vectors if name not in images]
    if observations is not None and groups != [_ONLY]:
        return one_item(observations, dict.fromkeys(vectors, 1) | dict.fromkeys(images, 3))
    if len(vectors) != 1 or images:
        raise CaptureFailed(
            f"the actor reads {', '.join(vectors + images)}: give one observation of each, such as "
            "env.get_observations(), or give the runner"
        )
    return {vectors[0]: torch.zeros(_width(model))}


def _width(model: Any) -> int:
    """The number of elements of the actor's only observation."""
    if hasattr(model, "obs_dim"):
        return int(model.obs_dim)
    for name in _MEMORIES:
        if hasattr(model, name):
            return int(getattr(model, name).rnn.input_size)
    network = model.actor if hasattr(model, "actor") else model.student
    return next(int(layer.in_features) for layer in network.modules() if isinstance(layer, nn.Linear))
