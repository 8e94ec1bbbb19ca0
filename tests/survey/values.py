"""Policies that choose by value: Q-values and C51."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from tensordict.nn import (
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl import modules as m
from torchrl.data import Categorical, Composite, MultiOneHot, OneHot

from tests.survey.parts import NETWORKS, Family, Made, mlp, seen

SPECS: dict[str, tuple[Any, int]] = {
    "Categorical": (partial(Categorical, 5), 5),
    "OneHot": (partial(OneHot, 5), 5),
    "MultiOneHot": (partial(MultiOneHot, (2, 3)), 5),
}
ACTION_SPACES = {"OneHot": "one_hot", "MultiOneHot": "mult_one_hot", "Categorical": "categorical"}


def by_value() -> Family:
    for (network, (make, key)), (spec, (action, outputs)), explore in product(
        NETWORKS.items(), SPECS.items(), (None, "EGreedyModule")
    ):

        def policy(make: Any = make, key: str = key, action: Any = action, n: int = outputs, e: Any = explore) -> Made:
            network = TensorDictModule(make(n), [key], ["action_value"])
            if isinstance(action(), MultiOneHot):
                actor: Any = TensorDictSequential(network, m.QValueModule(spec=action(), var_nums=[2, 3]))
            else:
                actor = m.QValueActor(network, spec=action())
            steps = [actor] if e is None else [actor, m.EGreedyModule(action(), eps_init=0.3, eps_end=0.3)]
            return TensorDictSequential(*steps), seen(key)

        yield f"QValueActor {network} {spec} {explore or ''}", policy

    for spec, (action, outputs) in SPECS.items():

        def hook(spec: str = spec, action: Any = action, n: int = outputs) -> Made:
            network = mlp(n)
            options = {"var_nums": [2, 3]} if spec == "MultiOneHot" else {}
            network.register_forward_hook(m.QValueHook(ACTION_SPACES[spec], **options))
            keys = ["action", "action_value", "chosen_action_value"]
            return m.Actor(
                network, spec=Composite({k: action() if k == "action" else None for k in keys}), out_keys=keys
            ), seen("observation")

        yield f"QValueHook {spec}", hook

    for spec, masked in product(("Categorical", "OneHot"), (False, True)):

        def module(spec: str = spec, masked: bool = masked) -> Made:
            action = SPECS[spec][0]()
            keys: dict[str, Any] = {"action_mask_key": "mask"} if masked else {}
            steps = [
                TensorDictModule(mlp(5), ["observation"], ["action_value"]),
                m.QValueModule(spec=action, **keys),
                m.EGreedyModule(action, eps_init=0.3, eps_end=0.3, **keys),
            ]
            more = {"mask": torch.ones(5, dtype=torch.bool)} if masked else {}
            return TensorDictSequential(*steps), seen("observation", **more)

        yield f"QValueModule {spec} {'mask' if masked else ''}", module

    for spec, explore, form in product(("Categorical", "OneHot"), (False, True), ("actor", "module", "hook")):

        def distributional(spec: str = spec, explore: bool = explore, form: str = form) -> Made:
            action, support = SPECS[spec][0](), torch.linspace(-1, 1, 7)
            network = nn.Sequential(mlp(35), nn.Unflatten(-1, (7, 5)))
            if form == "actor":
                actor: Any = m.DistributionalQValueActor(network, spec=action, support=support)
            elif form == "module":
                values = TensorDictModule(nn.Sequential(network, nn.LogSoftmax(-2)), ["observation"], ["action_value"])
                actor = TensorDictSequential(values, m.DistributionalQValueModule(ACTION_SPACES[spec], support))
            else:
                network = nn.Sequential(network, nn.LogSoftmax(-2))
                network.register_forward_hook(m.DistributionalQValueHook(ACTION_SPACES[spec], support=support))
                keys = ["action", "action_value"]
                actor = m.Actor(network, spec=Composite(action=action, action_value=None), out_keys=keys)
            steps = [actor, m.EGreedyModule(action, eps_init=0.3, eps_end=0.3)] if explore else [actor]
            return TensorDictSequential(*steps), seen("observation")

        yield f"C51 {form} {spec} {'ε' if explore else ''}", distributional
