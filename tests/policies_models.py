"""World models, recurrent cells and vision-language models of TorchRL in policies. The docstring is the title."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.modules import (
    GRU,
    MLP,
    DreamerActor,
    DreamerV3BlockGRU,
    DreamerV3BlockGRUCell,
    DreamerV3ImageEncoder,
    DreamerV3SeededPolicy,
    GRUCell,
    LeRobotPolicyWrapper,
    LSTMCell,
    ObsEncoder,
    RSSMPosterior,
    RSSMPrior,
    TanhNormal,
    TinyVLA,
)

from tests.policies import OBSERVATION

Pair = tuple[Any, TensorDict]


def dreamer_pixels() -> Pair:
    """Dreamer (`ObsEncoder`, `RSSMPosterior`, `DreamerActor`, `RSSMPrior`; state)"""
    torch.manual_seed(0)
    widths: dict[str, Any] = {"hidden_dim": 8, "rnn_hidden_dim": 8, "state_dim": 6}
    posterior = RSSMPosterior(**widths, obs_embed_dim=128)
    prior = RSSMPrior(Unbounded((2,)), **widths, action_dim=2)
    actor = DreamerActor(2, depth=1, num_cells=8)
    policy = TensorDictSequential(
        TensorDictModule(ObsEncoder(4, 4, in_channels=3), ["pixels"], ["embedding"]),
        TensorDictModule(posterior, ["belief", "embedding"], ["mean", "deviation", "state"]),
        TensorDictModule(actor, ["state", "belief"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=TanhNormal),
        TensorDictModule(prior, ["state", "belief", "action"], ["_", "_", "_", ("next", "belief")]),
    )
    policy(TensorDict({"pixels": torch.zeros(1, 3, 64, 64), "belief": torch.zeros(1, 8)}, [1]))  # lazy layers
    return policy, TensorDict({"pixels": torch.zeros(3, 64, 64), "belief": torch.zeros(8)})


def dreamer_v3_pixels() -> Pair:
    """`DreamerV3ImageEncoder` and `DreamerV3BlockGRUCell` (state), `DreamerV3SeededPolicy`"""
    torch.manual_seed(0)
    encoder = DreamerV3ImageEncoder(3, depth=4, mults=(1, 2))
    width = encoder(torch.zeros(1, 3, 16, 16)).shape[-1]
    cell = DreamerV3BlockGRUCell(width, 8, projection_size=8, num_blocks=2)
    policy = TensorDictSequential(
        TensorDictModule(encoder, ["pixels"], ["embedding"]),
        TensorDictModule(cell, ["embedding", "belief"], [("next", "belief")]),
        TensorDictModule(MLP(8, 4, num_cells=[8]), [("next", "belief")], ["logits"]),
        ProbabilisticTensorDictModule(
            ["logits"],
            ["action"],
            distribution_class=torch.distributions.Categorical,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )
    example = TensorDict({"pixels": torch.zeros(3, 16, 16), "belief": torch.zeros(8)})
    return TensorDictSequential(DreamerV3SeededPolicy(policy, seed=3)), example


class Steps(nn.Module):
    """A recurrent network for sequences, which is given one step at a time."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        result, after = self.network(features.unsqueeze(1), hidden.unsqueeze(0))
        return result.squeeze(1), after.squeeze(0)


class BlockSteps(nn.Module):
    """The same with a `DreamerV3BlockGRU`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        result, after = self.network(features.unsqueeze(1), hidden)
        return result.squeeze(1), after.reshape(hidden.shape)


class LSTMStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = LSTMCell(8, 8)

    def forward(self, features: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        after: tuple[Tensor, Tensor] = self.cell(features, (hidden, memory))
        return after


def cells() -> Pair:
    """`GRUCell`, `LSTMCell`, `GRU` and `DreamerV3BlockGRU` with state of one's own"""
    torch.manual_seed(0)
    block = DreamerV3BlockGRU(8, 8, projection_size=8, num_blocks=2)
    policy = TensorDictSequential(
        TensorDictModule(GRUCell(4, 8), ["observation", "a"], [("next", "a")]),
        TensorDictModule(LSTMStep(), [("next", "a"), "b", "c"], [("next", "b"), ("next", "c")]),
        TensorDictModule(Steps(GRU(8, 8)), [("next", "b"), "d"], ["features", ("next", "d")]),
        TensorDictModule(BlockSteps(block), ["features", "e"], ["last", ("next", "e")]),
        TensorDictModule(nn.Linear(8, 2), ["last"], ["action"]),
    )
    return policy, TensorDict({**OBSERVATION, **{name: torch.zeros(8) for name in "abcde"}})


def seeing() -> TensorDict:
    """An example of what vision-language-action policies read."""
    observation = TensorDict({"image": torch.zeros(3, 16, 16), "state": torch.zeros(5)})
    return TensorDict({"observation": observation, "language_instruction": NonTensorData("pick up the cup")})


def vla() -> Pair:
    """`TinyVLA` (the instruction is fixed)"""
    torch.manual_seed(0)
    policy = TinyVLA(action_dim=3, chunk_size=4, hidden_dim=16)
    policy(TensorDict.stack([seeing(), seeing()]))  # lazy layers
    return policy, seeing()


class Chunks(nn.Module):
    """A policy with the interface of LeRobot's."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(5, 12), nn.Unflatten(-1, (4, 3)))

    def predict_action_chunk(self, batch: Any) -> Tensor:
        chunk: Tensor = self.network(batch["observation.state"])
        return chunk


def wrapped_lerobot() -> Pair:
    """`LeRobotPolicyWrapper` (the instruction is fixed)"""
    torch.manual_seed(0)
    return LeRobotPolicyWrapper(Chunks(), action_dim=3, chunk_size=4), seeing()


KINDS: dict[str, Callable[[], Pair]] = {
    factory.__name__: factory
    for factory in (
        dreamer_pixels, dreamer_v3_pixels, cells, vla, wrapped_lerobot,
    )
}  # fmt: skip
