"""Policies of several agents."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictSequential,
)
from torch import distributions, nn
from torchrl import modules as m
from torchrl.data import Bounded, Categorical, Composite

from tests.survey.parts import AGENTS, WIDTH, Family, Made


def agents() -> Family:
    observation, action = ("agents", "observation"), ("agents", "action")

    def example(**more: torch.Tensor) -> TensorDict:
        return TensorDict({"agents": TensorDict({"observation": torch.zeros(AGENTS, WIDTH), **more}, [AGENTS])})

    def spec(of: Any) -> Composite:
        return Composite({"agents": Composite({"action": of}, shape=[AGENTS])})

    def mappo(network: Any) -> Made:
        keys = [("agents", "loc"), ("agents", "scale")]
        body = TensorDictModule(nn.Sequential(network(4), NormalParamExtractor()), [observation], keys)
        bounds = {"low": -torch.ones(AGENTS, 2), "high": torch.ones(AGENTS, 2)}
        return m.ProbabilisticActor(
            body, spec=spec(Bounded(-1, 1, (AGENTS, 2))), in_keys=keys, out_keys=[action],
            distribution_class=m.TanhNormal, distribution_kwargs=bounds, return_log_prob=True,
        ), example()  # fmt: skip

    def categorical(network: Any) -> Made:
        body = TensorDictModule(network(5), [observation], [("agents", "logits")])
        return m.ProbabilisticActor(
            body, in_keys=[("agents", "logits")], out_keys=[action], distribution_class=distributions.Categorical
        ), example()

    def one_hot(network: Any) -> Made:
        body = TensorDictModule(network(5), [observation], [("agents", "logits")])
        return m.ProbabilisticActor(
            body, in_keys=[("agents", "logits")], out_keys=[action], distribution_class=m.OneHotCategorical,
            default_interaction_type=InteractionType.RANDOM,
        ), example()  # fmt: skip

    def masked(network: Any) -> Made:
        body = TensorDictModule(network(5), [observation], [("agents", "logits")])
        keys = {"logits": ("agents", "logits"), "mask": ("agents", "mask")}
        return m.ProbabilisticActor(
            body, in_keys=keys, out_keys=[action], distribution_class=m.MaskedCategorical
        ), example(mask=torch.ones(AGENTS, 5, dtype=torch.bool))

    def q_values(network: Any) -> Any:
        values = ("agents", "action_value")
        return TensorDictSequential(
            TensorDictModule(network(5), [observation], [values]),
            m.QValueModule(
                action_value_key=values, out_keys=[action, values, ("agents", "chosen_action_value")],
                spec=spec(Categorical(5, shape=[AGENTS])),
            ),
        )  # fmt: skip

    def iql(network: Any) -> Made:
        return q_values(network), example()

    def iql_explored(network: Any) -> Made:
        explore = m.EGreedyModule(spec(Categorical(5, shape=[AGENTS])), eps_init=0.3, eps_end=0.3, action_key=action)
        return TensorDictSequential(q_values(network), explore), example()

    def maddpg(noise: str, network: Any) -> Made:
        of = spec(Bounded(-1, 1, (AGENTS, 2)))
        actor = m.ProbabilisticActor(
            TensorDictModule(network(2), [observation], [("agents", "param")]), spec=of, in_keys=[("agents", "param")],
            out_keys=[action], distribution_class=m.TanhDelta,
        )  # fmt: skip
        explore: Any = {
            "Gaussian": partial(m.AdditiveGaussianModule, of, action_key=action, sigma_init=0.3, sigma_end=0.3),
            "OU": partial(m.OrnsteinUhlenbeckProcessModule, of, action_key=action, eps_init=1.0, eps_end=1.0),
        }[noise]
        return TensorDictSequential(actor, explore()), example()

    def mixed(mixer: str, network: Any) -> Made:
        chosen = ("agents", "chosen_action_value")
        if mixer == "VDN":
            mix = TensorDictModule(m.VDNMixer(n_agents=AGENTS, device="cpu"), [chosen], ["chosen_action_value"])
            return TensorDictSequential(q_values(network), mix), example()
        module = m.QMixer(state_shape=(4,), mixing_embed_dim=8, n_agents=AGENTS, device="cpu")
        mix = TensorDictModule(module, [chosen, "state"], ["chosen_action_value"])
        return TensorDictSequential(q_values(network), mix), example().set("state", torch.zeros(4))

    heads: dict[str, Any] = {
        "MAPPO": mappo, "Categorical": categorical, "OneHotCategorical": one_hot, "masked": masked,
        "IQL": iql, "IQL ε": iql_explored, "MADDPG": partial(maddpg, "Gaussian"), "MADDPG OU": partial(maddpg, "OU"),
        "VDN": partial(mixed, "VDN"), "QMIX": partial(mixed, "QMIX"),
    }  # fmt: skip
    for (name, head), shared, centralised in product(heads.items(), (False, True), (False, True)):

        def policy(head: Any = head, shared: bool = shared, centralised: bool = centralised) -> Made:
            def network(outputs: int) -> Any:
                return m.MultiAgentMLP(
                    WIDTH, outputs, AGENTS, centralized=centralised, share_params=shared, depth=1, num_cells=8
                )

            made: Made = head(network)
            return made

        yield f"agents {name} {'shared' if shared else ''} {'centralised' if centralised else ''}", policy

    for shared, centralised in product((False, True), (False, True)):

        def screens(shared: bool = shared, centralised: bool = centralised) -> Made:
            network = m.MultiAgentConvNet(
                AGENTS, centralised, shared, in_features=3, num_cells=[4], kernel_sizes=3, strides=2
            )
            steps = [
                TensorDictModule(network, [observation], ["features"]),
                TensorDictModule(nn.LazyLinear(5), ["features"], [("agents", "logits")]),
                ProbabilisticTensorDictModule(
                    [("agents", "logits")], [action], distribution_class=distributions.Categorical
                ),
            ]
            policy = TensorDictSequential(*steps)
            group = TensorDict({"observation": torch.zeros(AGENTS, 3, 8, 8)}, [AGENTS])
            made = TensorDict({"agents": group})
            policy(made.clone().unsqueeze(0))
            return policy, made

        yield f"MultiAgentConvNet {'shared' if shared else ''} {'centralised' if centralised else ''}", screens
