"""Networks and observations that the policies of the survey share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn
from torchrl import modules as m

from actserve_export.sources.policy_source import PolicySource

Made = tuple[Any, TensorDict] | PolicySource
Factory = Callable[[], Made]
Family = Iterator[tuple[str, Factory]]
WIDTH = 4
AGENTS = 3
FOUR = {"observation": torch.zeros(WIDTH)}
SCREEN = (3, 12, 12)


def mlp(outputs: int, inputs: int = WIDTH) -> m.MLP:
    return m.MLP(in_features=inputs, out_features=outputs, num_cells=[16])


def noisy(outputs: int, inputs: int = WIDTH) -> nn.Module:
    return m.MLP(in_features=inputs, out_features=outputs, num_cells=[16], layer_class=m.NoisyLinear)


def normalised(outputs: int, inputs: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.LayerNorm(16), nn.ELU(), nn.Linear(16, outputs))


def skipping(outputs: int, inputs: int = WIDTH) -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(inputs, inputs), nn.Linear(inputs, outputs)

        def forward(self, x: torch.Tensor) -> Any:
            return self.last(x + nn.functional.silu(self.inner(x)))

    return Residual()


def convolutions(outputs: int, inputs: int = WIDTH) -> nn.Module:
    cells = m.ConvNet(in_features=3, num_cells=[4, 4], kernel_sizes=[3, 3], strides=[2, 1])
    return nn.Sequential(cells, nn.Linear(36, outputs))


def duel(outputs: int, inputs: int = WIDTH) -> nn.Module:
    cnn = {"in_features": 3, "num_cells": [4], "kernel_sizes": 3, "strides": 2}
    network = m.DuelingCnnDQNet(out_features=outputs, cnn_kwargs=cnn, mlp_kwargs={"num_cells": [8], "depth": 1})
    network(torch.zeros(1, *SCREEN))
    return network


NETWORKS: dict[str, tuple[Any, str]] = {
    "MLP": (mlp, "observation"),
    "NoisyLinear": (noisy, "observation"),
    "LayerNorm": (normalised, "observation"),
    "residual": (skipping, "observation"),
    "ConvNet": (convolutions, "pixels"),
    "DuelingCnnDQNet": (duel, "pixels"),
}
EXAMPLES = {"observation": torch.zeros(WIDTH), "pixels": torch.zeros(SCREEN)}


def seen(key: str, **more: torch.Tensor) -> TensorDict:
    return TensorDict({key: EXAMPLES[key], **more})


LOC = ["loc", "scale"]
BOUNDS = {"low": -torch.ones(2), "high": torch.ones(2)}
