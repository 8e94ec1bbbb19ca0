"""The bundled policy with memory: `pong-lstm` acts on one raw screen and its LSTM state."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Categorical
from torchrl.modules import LSTMModule, QValueModule

from actserve_export.sources.policy_source import PolicySource
from actserve_export.training import atari, bundled

ACTIONS = 6
MEMORY = 256  # the size of h and of c
FEATURES = 512


class Head(nn.Module):
    """(B, 512) features and (B, 256) memory -> (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES + MEMORY, ACTIONS)

    def forward(self, features: Tensor, memory: Tensor) -> Tensor:
        values: Tensor = self.linear(torch.cat((features, memory), -1))
        return values


def recurrent_network() -> TensorDictSequential:
    """pixels (B, 1, 84, 84) and LSTM state -> action_value (B, 6): the Nature CNN, an LSTM, a layer on both."""
    values = atari.value_network(ACTIONS)
    features = nn.Sequential(values[0], *list(values[1])[:-1])
    return TensorDictSequential(
        TensorDictModule(features, in_keys=["pixels"], out_keys=["features"]),
        LSTMModule(input_size=FEATURES, hidden_size=MEMORY, in_key="features", out_key="memory"),
        TensorDictModule(Head(), in_keys=["features", "memory"], out_keys=["action_value"]),
    )


def copy_feed_forward_weights(network: TensorDictSequential, weights: dict[str, Tensor]) -> None:
    """Give a recurrent network the weights of a feed-forward one, so that it first acts in the same way."""
    feed_forward = atari.value_network(ACTIONS)
    feed_forward.load_state_dict(weights)
    features, _, head = network
    features.module[0].load_state_dict(feed_forward[0].state_dict())
    features.module[1].load_state_dict(feed_forward[1][0].state_dict())
    head.module.linear.weight.zero_()
    head.module.linear.weight[:, :FEATURES] = feed_forward[1][-1].weight
    head.module.linear.bias.copy_(feed_forward[1][-1].bias)


def pong_lstm() -> PolicySource:
    """The recurrent policy for raw screens, with the bundled weights."""
    world = atari.environment("pong")
    network = recurrent_network().requires_grad_(False)
    network.load_state_dict(load_file(bundled.WEIGHTS["pong-lstm"]))
    player = bundled.policy("pong").weights  # plays the games whose screens the certificate uses
    assert player is not None
    choose = QValueModule(spec=Categorical(ACTIONS))
    return PolicySource(
        policy=TensorDictSequential(atari.preprocessing(), *network, choose),
        example=TensorDict(
            {
                "pixels": torch.zeros(atari.screen("pong"), dtype=torch.uint8),
                "is_init": torch.zeros(1, dtype=torch.bool),
                "recurrent_state_h": torch.zeros(1, MEMORY),
                "recurrent_state_c": torch.zeros(1, MEMORY),
            }
        ),
        outputs=("action", "action_value"),
        observe=lambda count: atari.observe(world, player, count),
        environment=world,
        weights=network,
    )
