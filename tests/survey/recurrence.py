"""Recurrent policies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl import modules as m
from torchrl.data import OneHot

from tests.survey.parts import LOC, WIDTH, Family, Made, mlp, seen


def recurrent() -> Family:
    def q_values(width: int) -> list[Any]:
        return [TensorDictModule(mlp(5, width), ["features"], ["action_value"]), m.QValueModule(spec=OneHot(5))]

    def greedy(width: int) -> list[Any]:
        return [*q_values(width), m.EGreedyModule(OneHot(5), eps_init=0.3, eps_end=0.3)]

    def squashed(width: int) -> list[Any]:
        body = TensorDictModule(nn.Sequential(mlp(4, width), NormalParamExtractor()), ["features"], LOC)
        return [body, ProbabilisticTensorDictModule(LOC, ["action"], distribution_class=m.TanhNormal)]

    def discrete(width: int) -> list[Any]:
        body = TensorDictModule(mlp(5, width), ["features"], ["logits"])
        choose = ProbabilisticTensorDictModule(
            ["logits"], ["action"], distribution_class=m.OneHotCategorical,
            default_interaction_type=InteractionType.RANDOM,
        )  # fmt: skip
        return [body, choose]

    options: dict[str, dict[str, Any]] = {
        "1 layer": {},
        "2 layers": {"num_layers": 2},
        "3 layers, dropout": {"num_layers": 3, "dropout": 0.3},
        "Python": {"python_based": True},
        "no bias": {"bias": False},
        "default mode": {"default_recurrent_mode": False},
    }
    keys: dict[str, Any] = {"input_size": WIDTH, "hidden_size": 8, "in_key": "observation", "out_key": "features"}
    cells: dict[str, Callable[[], Any]] = {
        f"{kind.__name__} {name}": partial(kind, **keys, **options[name])
        for kind, name in product((m.LSTMModule, m.GRUModule), options)
    }
    for (cell, make), head in product(cells.items(), (q_values, greedy, squashed, discrete)):

        def policy(make: Any = make, head: Any = head) -> Made:
            return TensorDictSequential(make(), *head(8)), seen("observation")

        yield f"{cell}, {head.__name__}", policy

    def projected() -> Made:
        lstm = nn.LSTM(WIDTH, 8, proj_size=3, batch_first=True)
        cell = m.LSTMModule(
            lstm=lstm, in_keys=["observation", "h", "c"], out_keys=["features", ("next", "h"), ("next", "c")]
        )
        return TensorDictSequential(cell, *q_values(3)), seen("observation")

    yield "LSTMModule proj_size", projected

    for kind, order in product((m.LSTMModule, m.GRUModule), ("after", "before")):

        def with_layers(kind: Any = kind, order: str = order) -> Made:
            cell = kind(input_size=6, hidden_size=8, in_key="embedded", out_key="features")
            embed = TensorDictModule(nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU()), ["observation"], ["embedded"])
            steps = (
                [embed, cell]
                if order == "before"
                else [embed, cell, TensorDictModule(nn.LayerNorm(8), ["features"], ["features"])]
            )
            return TensorDictSequential(*steps, *q_values(8)), seen("observation")

        yield f"{kind.__name__} with layers {order}", with_layers

        def keyed(kind: Any = kind, order: str = order) -> Made:
            hidden = ["h", "c"] if kind is m.LSTMModule else ["h"]
            key: Any = ("memory", "h") if order == "after" else "h"
            hidden[0] = key
            nexts = [("next", *(k if isinstance(k, tuple) else (k,))) for k in hidden]
            cell = kind(
                input_size=WIDTH, hidden_size=8, in_keys=["observation", *hidden], out_keys=["features", *nexts]
            )
            return TensorDictSequential(cell, *q_values(8)), seen("observation")

        yield f"{kind.__name__} keys {order}", keyed

    for name, cell_class in {"GRUCell": nn.GRUCell, "RNNCell": nn.RNNCell, "torchrl GRUCell": m.GRUCell}.items():

        def own(cell_class: Any = cell_class) -> Made:
            steps = [
                TensorDictModule(cell_class(WIDTH, 8), ["observation", "h"], [("next", "h")]),
                TensorDictModule(mlp(2, 8), [("next", "h")], ["action"]),
            ]
            return TensorDictSequential(*steps), seen("observation", h=torch.zeros(8))

        yield f"own state {name}", own
