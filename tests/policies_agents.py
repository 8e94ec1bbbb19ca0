"""Policies of several agents, as TorchRL's tutorials write them. The docstring is the title in the table of kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Categorical, Composite
from torchrl.modules import (
    CrossCriticGroupSpec,
    CrossGroupCritic,
    EGreedyModule,
    MaskedCategorical,
    MultiAgentConvNet,
    MultiAgentMLP,
    OrnsteinUhlenbeckProcessModule,
    ProbabilisticActor,
    QMixer,
    QValueModule,
    TanhDelta,
    TanhNormal,
    VDNMixer,
    VmapModule,
)

Pair = tuple[Any, TensorDict]
AGENTS = 3
OBSERVATION, ACTION, VALUES = ("agents", "observation"), ("agents", "action"), ("agents", "action_value")
CHOSEN = ("agents", "chosen_action_value")


def example(*shape: int, **more: Any) -> TensorDict:
    """The observations of one item, with the agents as the batch size of their group, as environments have it."""
    group = TensorDict({"observation": torch.zeros(AGENTS, *(shape or (4,)))}, [AGENTS])
    return TensorDict({"agents": group.update(more)})


def mlp(outputs: int, share_params: bool = False, centralized: bool = False, inputs: int = 4) -> MultiAgentMLP:
    torch.manual_seed(0)
    return MultiAgentMLP(
        inputs, outputs, AGENTS, centralized=centralized, share_params=share_params, depth=1, num_cells=8
    )


def spec(action: Any) -> Composite:
    return Composite({"agents": Composite({"action": action}, shape=[AGENTS])})


def values(network: Any) -> TensorDictSequential:
    """Q-values, one of 5 actions for each agent."""
    choose = QValueModule(
        action_value_key=VALUES, out_keys=[ACTION, VALUES, CHOSEN], spec=spec(Categorical(5, shape=[AGENTS]))
    )
    return TensorDictSequential(network, choose)


def mappo() -> Pair:
    """MAPPO: `MultiAgentMLP`, a network for each agent, `TanhNormal`"""
    network = nn.Sequential(mlp(4), NormalParamExtractor())
    parameters = [("agents", "loc"), ("agents", "scale")]
    module = TensorDictModule(network, in_keys=[OBSERVATION], out_keys=parameters)
    low, high = -torch.ones(AGENTS, 2), torch.ones(AGENTS, 2)
    policy = ProbabilisticActor(
        module,
        spec=spec(Bounded(low, high)),
        in_keys=parameters,
        out_keys=[ACTION],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": low, "high": high},
        return_log_prob=True,
        log_prob_key=("agents", "sample_log_prob"),
    )
    return policy, example()


def masked_agents() -> Pair:
    """masked categorical actions of several agents"""
    module = TensorDictModule(mlp(5, share_params=True), in_keys=[OBSERVATION], out_keys=[("agents", "logits")])
    keys = {"logits": ("agents", "logits"), "mask": ("agents", "action_mask")}
    policy = ProbabilisticActor(module, in_keys=keys, out_keys=[ACTION], distribution_class=MaskedCategorical)
    return policy, example(action_mask=torch.ones(AGENTS, 5, dtype=torch.bool))


def qmix() -> Pair:
    """`MultiAgentConvNet`, ε-greedy for each agent, `QMixer`"""
    torch.manual_seed(0)
    convolutions = MultiAgentConvNet(AGENTS, False, True, in_features=3, num_cells=[4], kernel_sizes=3, strides=2)
    network = TensorDictSequential(
        TensorDictModule(convolutions, in_keys=[OBSERVATION], out_keys=["features"]),
        TensorDictModule(mlp(5, inputs=36), in_keys=["features"], out_keys=[VALUES]),
    )
    greedy = values(network)
    explore = EGreedyModule(spec(Categorical(5, shape=[AGENTS])), eps_init=0.3, eps_end=0.3, action_key=ACTION)
    mixer = QMixer(state_shape=(2, 4), mixing_embed_dim=8, n_agents=AGENTS, device="cpu")
    mix = TensorDictModule(mixer, in_keys=[CHOSEN, "state"], out_keys=["chosen_action_value"])
    return TensorDictSequential(*greedy.module, explore, mix), example(3, 8, 8).set("state", torch.zeros(2, 4))


def vdn() -> Pair:
    """one `MultiAgentMLP` that all agents share, `VDNMixer`"""
    network = TensorDictModule(mlp(5, share_params=True, centralized=True), in_keys=[OBSERVATION], out_keys=[VALUES])
    mixer = VDNMixer(n_agents=AGENTS, device="cpu")
    mix = TensorDictModule(mixer, in_keys=[CHOSEN], out_keys=["chosen_action_value"])
    return TensorDictSequential(*values(network).module, mix), example()


def maddpg() -> Pair:
    """MADDPG: `TanhDelta`, Ornstein-Uhlenbeck noise (state) for each agent"""
    module = TensorDictModule(mlp(2), in_keys=[OBSERVATION], out_keys=[("agents", "param")])
    policy = ProbabilisticActor(
        module,
        spec=spec(Bounded(-1, 1, (AGENTS, 2))),
        in_keys=[("agents", "param")],
        out_keys=[ACTION],
        distribution_class=TanhDelta,
    )
    noise = OrnsteinUhlenbeckProcessModule(policy.spec, eps_init=1.0, eps_end=1.0, dt=0.1, action_key=ACTION)
    return TensorDictSequential(policy, noise), example()


def cross_group_critic() -> Pair:
    """`CrossGroupCritic` (values of two groups)"""
    torch.manual_seed(0)
    sizes = {"soldiers": (2, 4), "medics": (1, 3)}  # (agents, observation)
    groups = {
        name: CrossCriticGroupSpec(size, count, (name, "observation"), (name, "state_value"))
        for name, (count, size) in sizes.items()
    }
    items = {name: TensorDict({"observation": torch.zeros(size)}, size[:1]) for name, size in sizes.items()}
    return CrossGroupCritic(groups), TensorDict(items)


def vmap_module() -> Pair:
    """`VmapModule`"""
    module = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    return VmapModule(module, 0), TensorDict({"observation": torch.zeros(4)})


class Ensemble(nn.Module):
    """The mean of several networks, whose weights `torch.func` stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(nn.Linear(4, 2) for _ in range(AGENTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters, buffers = torch.func.stack_module_state(list(self.networks))

        def call(weights: Any, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.func.functional_call(self.networks[0], weights, (x,))
            return result

        return torch.vmap(call, (0, None))((parameters, buffers), x).mean(0)


def ensemble() -> Pair:
    """an ensemble by `torch.func` and `torch.vmap`"""
    torch.manual_seed(0)
    module = TensorDictModule(Ensemble(), in_keys=["observation"], out_keys=["action"])
    return module, TensorDict({"observation": torch.zeros(4)})


KINDS: dict[str, Callable[[], Pair]] = {
    factory.__name__: factory
    for factory in (mappo, masked_agents, qmix, vdn, maddpg, cross_group_critic, vmap_module, ensemble)
}
