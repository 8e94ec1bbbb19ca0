"""skrl's agents and models -> PolicySource: what a trainer's evaluation makes them do, as a function of tensors.

Models are recognised by their methods, and skrl is not imported. skrl 2 has `observations` and `states`, skrl 1 only
`states`, which are the observations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from actserve.core.environment import Contract
from actserve.core.errors import CaptureFailed
from actserve_export.sources.library_actor import RecurrentActor, Tensors, WithoutDraws, fresh_copy, restored, titled
from actserve_export.sources.policy_source import PolicySource

_OBSERVATION, _STATES = "observation", "states"


def from_skrl(
    policy: Any, *, preprocessor: nn.Module | None = None, environment: Contract | None = None
) -> PolicySource:
    """An agent of skrl, or its policy or Q-network, acting as a trainer's `eval` does, or at random as in training.

    The observation is flattened as skrl's wrappers flatten it: (n,). A policy that reads the environment's state takes
    it as `states`. The deterministic action is the mean of a Gaussian, and the most likely one of a Categorical, where
    skrl itself always samples. A model with values for discrete actions takes the largest.
    `preprocessor` is the `RunningStandardScaler` of the observations; that of an agent is found without it.
    Raises `CaptureFailed` for anything else.
    """
    agent = policy if hasattr(policy, "checkpoint_modules") else None
    states_preprocessor = None
    if agent is not None:
        found = (getattr(agent, name, None) for name in ("policy", "q_network"))
        policy = next((model for model in found if isinstance(model, nn.Module)), None)
        own = getattr(agent, "_observation_preprocessor", getattr(agent, "_state_preprocessor", None))
        preprocessor = _scaler(own) if preprocessor is None else preprocessor
        if hasattr(agent, "_observation_preprocessor"):
            states_preprocessor = _scaler(agent._state_preprocessor)
    if not isinstance(policy, nn.Module) or not (hasattr(policy, "act") and hasattr(policy, "compute")):
        got = type(agent if policy is None else policy).__name__
        raise CaptureFailed(f"expected an agent or a model of skrl, on PyTorch; got a {got}")
    actor = _Actor(policy, preprocessor, states_preprocessor)
    return actor.source(titled("skrl", "skrl"), "the model's own act", environment)


def _scaler(preprocessor: Any) -> nn.Module | None:
    """None if the agent has no preprocessor. Raises `CaptureFailed` for one that is no module."""
    if isinstance(preprocessor, nn.Module):
        return preprocessor
    if getattr(preprocessor, "__name__", "_empty_preprocessor") == "_empty_preprocessor":
        return None
    raise CaptureFailed(f"expected a preprocessor that is an nn.Module; got a {type(preprocessor).__name__}")


class _Actor(RecurrentActor):
    def __init__(
        self, policy: nn.Module, preprocessor: nn.Module | None, states_preprocessor: nn.Module | None
    ) -> None:
        model = fresh_copy(policy)
        model.device = torch.device("cpu")
        sizes = model.get_specification().get("rnn", {}).get("sizes", [])
        if len(sizes) > 2:
            raise CaptureFailed(f"expected the state of one GRU or LSTM; the policy specifies {len(sizes)} tensors")
        memory = {name: (int(size[0]), int(size[2])) for name, size in zip(("hidden", "cell"), sizes, strict=False)}
        observations = {_OBSERVATION: torch.zeros(_width(model.observation_space, model.num_observations))}
        if getattr(model, "state_space", None) is not None and _reads_states(model, observations, memory):
            observations[_STATES] = torch.zeros(_width(model.state_space, model.num_states))
        discrete = isinstance(model.action_space, spaces.Discrete)
        values = discrete and not hasattr(model, "distribution")
        super().__init__(observations, memory, ["action_value"] if values else [])
        self.model, self.discrete, self.values = model, discrete, values
        self.preprocessor = None if preprocessor is None else fresh_copy(preprocessor)
        self.states_preprocessor = None if states_preprocessor is None else fresh_copy(states_preprocessor)

    def run(self, seen: Tensors, memory: list[Tensor], deterministic: bool) -> tuple[Any, ...]:
        with restored(self.model):
            if deterministic:
                with WithoutDraws():
                    action, *_, outputs = self.model.act(self._inputs(seen, memory), role="policy")
                action = outputs.get("mean_actions", action)
            else:
                action, *_, outputs = self.model.act(self._inputs(seen, memory), role="policy")
        scores = [action] if self.values else []
        action = action.argmax(1) if self.values else action.reshape(-1) if self.discrete else action
        return (action, list(outputs.get("rnn", [])), *scores)

    def run_library(self, seen: Tensors, memory: list[Tensor], begins: Tensor) -> tuple[Tensor, list[Tensor]]:
        for tensor in memory:
            tensor[:, begins] = 0
        action, *_, outputs = self.model.act(self._inputs(seen, memory), role="policy")
        action = outputs.get("mean_actions", action)
        if self.values:
            action = action.argmax(1)
        elif "net_output" in outputs:  # of a Categorical, whose library only samples
            counts = [outputs["net_output"].shape[1]] if self.discrete else self.model.action_space.nvec.tolist()
            parts = [part.argmax(1) for part in outputs["net_output"].split(counts, 1)]
            action = parts[0] if self.discrete else torch.stack(parts, 1)
        return action, list(outputs.get("rnn", []))

    def _inputs(self, seen: Tensors, memory: list[Tensor]) -> dict[str, Any]:
        observation, states = seen[_OBSERVATION], seen.get(_STATES)
        if self.preprocessor is not None:
            observation = self.preprocessor(observation)
        if self.states_preprocessor is not None and states is not None:
            states = self.states_preprocessor(states)
        return _inputs(self.model, observation, states, memory)


def _inputs(model: Any, observation: Tensor, states: Tensor | None, memory: list[Tensor]) -> dict[str, Any]:
    named = (
        {"observations": observation, "states": states} if hasattr(model, "state_space") else {"states": observation}
    )
    return named | ({"rnn": memory} if memory else {})


def _reads_states(model: Any, observations: Tensors, memory: dict[str, tuple[int, int]]) -> bool:
    """Whether a policy of skrl 2 reads the environment's state: without it, it fails."""
    before = [torch.zeros(layers, 1, units) for layers, units in memory.values()]
    try:
        with torch.no_grad(), torch.random.fork_rng(), restored(model):
            model.act(_inputs(model, observations[_OBSERVATION].unsqueeze(0), None, before), role="policy")
    except Exception:  # the user's own `compute`
        return True
    return False


def _width(space: Any, default: int) -> int:
    """The number of elements of an observation, as skrl flattens it: a discrete one has one."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return sum(_width(part, 0) for part in parts)
    return math.prod(space.shape) if space is not None and space.shape is not None else int(default)
