"""Small policies as a user would write them, for the tests."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import Categorical
from torchrl.modules import MLP, QValueModule

from exporters.source import PolicySource


def cart() -> PolicySource:
    """Four numbers in, one of three actions out."""
    torch.manual_seed(0)
    network = TensorDictModule(
        MLP(in_features=4, out_features=3, num_cells=[16]), in_keys=["observation"], out_keys=["action_value"]
    )
    policy = TensorDictSequential(network, QValueModule(spec=Categorical(3)))
    return PolicySource(policy, TensorDict({"observation": torch.zeros(4)}), outputs=("action", "action_value"))


def cart_pair() -> tuple[TensorDictSequential, TensorDict]:
    """The same as the plain pair that a factory may return."""
    source = cart()
    return source.policy, source.example
