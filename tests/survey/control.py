"""Continuous actions, and noise added to them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from tensordict.nn import (
    NormalParamExtractor,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl import modules as m
from torchrl.data import Bounded, Unbounded

from tests.survey.parts import BOUNDS, LOC, WIDTH, Family, Made, mlp, seen


def continuous() -> Family:
    def plain() -> Any:
        return TensorDictModule(nn.Sequential(mlp(2), nn.Tanh()), ["observation"], ["action"])

    def tanh_module() -> Any:
        actor = TensorDictModule(mlp(2), ["observation"], ["action"])
        return TensorDictSequential(actor, m.TanhModule(in_keys=["action"], low=-2.0, high=1.0))

    def tanh_module_by_spec() -> Any:
        spec = Bounded(torch.tensor([-1.0, -3.0]), torch.tensor([1.0, 2.0]), (2,))
        return TensorDictSequential(
            TensorDictModule(mlp(2), ["observation"], ["action"]), m.TanhModule(in_keys=["action"], spec=spec)
        )

    def ddpg() -> Any:
        small = {"in_features": WIDTH, "num_cells": [8], "depth": 1}
        network = TensorDictModule(m.DdpgMlpActor(2, mlp_net_kwargs=small), ["observation"], ["param"])
        return m.ProbabilisticActor(
            network, in_keys=["param"], spec=Bounded(-1, 1, (2,)), distribution_class=m.TanhDelta
        )

    def safe() -> Any:
        return m.SafeModule(
            mlp(2), spec=Bounded(-0.5, 0.5, (2,)), in_keys=["observation"], out_keys=["action"], safe=True
        )

    def actor() -> Any:
        return m.Actor(mlp(2), in_keys=["observation"], spec=Unbounded((2,)))

    def sequential() -> Any:
        first = m.SafeModule(nn.Linear(WIDTH, 8), in_keys=["observation"], out_keys=["hidden"])
        second = m.SafeModule(nn.Linear(8, 2), in_keys=["hidden"], out_keys=["action"])
        return m.SafeSequential(first, second)

    def truncated() -> Any:
        body = nn.Sequential(mlp(4), NormalParamExtractor())
        module = TensorDictModule(body, ["observation"], LOC)
        return m.ProbabilisticActor(
            module, in_keys=LOC, distribution_class=m.TruncatedNormal, distribution_kwargs=BOUNDS
        )

    spec = Bounded(-1, 1, (2,))
    noises: dict[str, Callable[[], Any] | None] = {
        "": None,
        "Gaussian": lambda: m.AdditiveGaussianModule(spec, sigma_init=0.3, sigma_end=0.3, mean=0.1, std=0.5),
        "Gaussian, annealed": lambda: m.AdditiveGaussianModule(spec, annealing_num_steps=100),
        "Gaussian, unsafe": lambda: m.AdditiveGaussianModule(spec, safe=False),
        "Ornstein-Uhlenbeck": lambda: m.OrnsteinUhlenbeckProcessModule(spec, eps_init=1.0, eps_end=1.0),
        "Ornstein-Uhlenbeck, n_steps_annealing": lambda: m.OrnsteinUhlenbeckProcessModule(
            spec, mu=0.1, x0=0.2, sigma_min=0.05, n_steps_annealing=10
        ),
    }
    actors = (plain, tanh_module, tanh_module_by_spec, ddpg, safe, actor, sequential, truncated)
    for make, (name, noise) in product(actors, noises.items()):
        if noise is not None and name not in ("Gaussian", "Ornstein-Uhlenbeck") and make not in (plain, ddpg):
            continue

        def policy(make: Any = make, noise: Any = noise) -> Made:
            steps = [make()] if noise is None else [make(), noise()]
            return TensorDictSequential(*steps), seen("observation")

        yield f"{make.__name__} {name}", policy
