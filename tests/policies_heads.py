"""Distributions, heads and networks of TorchRL in policies. The docstring is the title in the table of kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import distributions, nn
from torchrl.data import Composite, MultiOneHot, OneHot
from torchrl.modules import (
    MLP,
    Actor,
    ActorCriticOperator,
    ActorCriticWrapper,
    BatchRenorm1d,
    ConsistentDropoutModule,
    Conv3dNet,
    DdpgCnnActor,
    DdpgCnnQNet,
    DdpgMlpActor,
    DdpgMlpQNet,
    Delta,
    DistributionalQValueActor,
    DistributionalQValueHook,
    DuelingCnnDQNet,
    EGreedyModule,
    IndependentNormal,
    LLMMaskedCategorical,
    MaskedOneHotCategorical,
    NoisyLazyLinear,
    NoisyLinear,
    OneHotCategorical,
    OneHotOrdinal,
    Ordinal,
    ProbabilisticActor,
    QValueActor,
    QValueHook,
    SafeModule,
    Squeeze2dLayer,
    SqueezeLayer,
    TanhModule,
    TanhNormal,
    ValueOperator,
)
from torchrl.modules.models.exploration import gSDEModule

from tests.policies import OBSERVATION

Pair = tuple[Any, TensorDict]
NORMAL = ["loc", "scale"]
PIXELS = {"in_features": 3, "num_cells": [4], "kernel_sizes": 3, "strides": 2, "paddings": 0, "depth": 1}


def layers(outputs: int, network: type[nn.Module] = nn.Linear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(network(4, 8), nn.Tanh(), network(8, outputs))


class Split(nn.Module):
    """A network, and functions that give the parameters of several heads from its results."""

    def __init__(self, outputs: int, *heads: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.network, self.heads = layers(outputs), heads

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.network(x)
        return tuple(head(features) for head in self.heads)


def first_two(x: torch.Tensor) -> torch.Tensor:
    return x[..., :2]


def positive(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.softplus(x[..., 2:4]) + 0.2


def last_four(x: torch.Tensor) -> torch.Tensor:
    return x[..., -4:]


def triangle(x: torch.Tensor) -> torch.Tensor:
    """(..., 2, 2), lower triangular."""
    return torch.diag_embed(positive(x)) + torch.tensor([[0.0, 0.0], [0.5, 0.0]])


def head(distribution: Any, action: str, keys: Any, **options: Any) -> ProbabilisticTensorDictModule:
    return ProbabilisticTensorDictModule(
        in_keys=keys,
        out_keys=[action],
        distribution_class=distribution,
        default_interaction_type=InteractionType.RANDOM,
        **options,
    )


def c51() -> Pair:
    """C51: `DistributionalQValueActor` with `NoisyLinear`, ε-greedy over `MultiOneHot`"""
    network = nn.Sequential(layers(25, NoisyLinear), nn.Unflatten(-1, (5, 5)))
    spec = OneHot(5)
    actor = DistributionalQValueActor(network, support=torch.linspace(-1, 1, 5), spec=spec)
    return TensorDictSequential(actor, EGreedyModule(spec, eps_init=0.3, eps_end=0.3)), TensorDict(OBSERVATION)


def c51_hook() -> Pair:
    """C51: `DistributionalQValueHook`"""
    network = nn.Sequential(layers(15), nn.Unflatten(-1, (5, 3)), nn.LogSoftmax(-2))
    network.register_forward_hook(DistributionalQValueHook("one_hot", support=torch.arange(5.0)))
    return Actor(network, spec=OneHot(3), out_keys=["action", "action_value"]), TensorDict(OBSERVATION)


def value_hook() -> Pair:
    """`QValueHook`, ε-greedy over `MultiOneHot`"""
    network = layers(5)
    network.register_forward_hook(QValueHook("mult_one_hot", var_nums=[2, 3]))
    out_keys = ["action", "action_value", "chosen_action_value"]
    explore = EGreedyModule(MultiOneHot((2, 3)), eps_init=0.3, eps_end=0.3)
    return TensorDictSequential(Actor(network, out_keys=out_keys), explore), TensorDict(OBSERVATION)


def hybrid() -> Pair:
    """`CompositeDistribution`: a continuous and a one-hot action, with their log-probabilities"""
    keys = [("params", "steer", "loc"), ("params", "steer", "scale"), ("params", "gear", "logits")]
    module = TensorDictModule(Split(8, first_two, positive, last_four), in_keys=["observation"], out_keys=keys)
    actions = ProbabilisticTensorDictModule(
        in_keys=["params"],
        distribution_class=CompositeDistribution,
        distribution_kwargs={"distribution_map": {"steer": TanhNormal, "gear": OneHotCategorical}},
        return_log_prob=True,
    )
    return ProbabilisticTensorDictSequential(module, actions), TensorDict(OBSERVATION)


def heads_of_torchrl() -> Pair:
    """several heads: `IndependentNormal`, `Delta`, `Ordinal`, `OneHotOrdinal`, `MaskedOneHotCategorical`, …"""
    module = TensorDictModule(
        Split(8, first_two, positive, last_four), in_keys=["observation"], out_keys=[*NORMAL, "scores"]
    )
    masked = {"logits": "scores", "mask": "mask"}
    policy = TensorDictSequential(
        module,
        head(IndependentNormal, "move", NORMAL, return_log_prob=True),
        head(Delta, "look", {"param": "loc"}),
        head(Ordinal, "rank", ["scores"]),
        head(OneHotOrdinal, "grade", ["scores"]),
        head(MaskedOneHotCategorical, "choice", masked),
        head(LLMMaskedCategorical, "token", masked),
    )
    return policy, TensorDict({**OBSERVATION, "mask": torch.ones(4, dtype=torch.bool)})


def heads_of_torch() -> Pair:
    """several heads: `Laplace`, `Gumbel`, `LogisticNormal`, `Kumaraswamy`, `Independent(Categorical)`, …"""
    parameters = [*NORMAL, "logits", "scale_tril"]
    network = Split(12, first_two, positive, lambda x: x[..., -8:].unflatten(-1, (2, 4)), triangle)
    concentrations = {"concentration1": "scale", "concentration0": "scale"}

    def independent(logits: torch.Tensor) -> distributions.Independent:
        return distributions.Independent(distributions.Categorical(logits=logits), 1)

    policy = TensorDictSequential(
        TensorDictModule(network, in_keys=["observation"], out_keys=parameters),
        head(distributions.Laplace, "laplace", NORMAL),
        head(distributions.Gumbel, "gumbel", NORMAL),
        head(distributions.LogisticNormal, "share", NORMAL),
        head(distributions.Kumaraswamy, "part", concentrations),
        head(distributions.MultivariateNormal, "correlated", ["loc", "scale_tril"], return_log_prob=True),
        head(independent, "choices", ["logits"], return_log_prob=True),
    )
    return policy, TensorDict(OBSERVATION)


def beta() -> Pair:
    """`Beta`: deterministic only, because its draws cannot be inputs"""
    keys = ["concentration1", "concentration0"]
    module = TensorDictModule(
        Split(4, lambda x: 1 + positive(x), lambda x: 2 + positive(-x)), in_keys=["observation"], out_keys=keys
    )
    policy = ProbabilisticActor(
        module, in_keys=keys, distribution_class=lambda **c: distributions.Independent(distributions.Beta(**c), 1)
    )
    return policy, TensorDict(OBSERVATION)


def gsde() -> Pair:
    """`gSDEModule`: noise that depends on the state, drawn once an episode (state)"""
    mean = TensorDictModule(layers(2), in_keys=["observation"], out_keys=["action"])
    noise = TensorDictModule(
        gSDEModule(2, 4), in_keys=["action", "observation", "_eps_gSDE"], out_keys=[*NORMAL, "action", "_eps_gSDE"]
    )
    actor = ProbabilisticActor(noise, in_keys=NORMAL, distribution_class=TanhNormal)
    return ProbabilisticTensorDictSequential(mean, *actor), TensorDict(OBSERVATION)


def in_evaluation_mode() -> Pair:
    """`ConsistentDropoutModule`, `BatchRenorm1d`, `NoisyLazyLinear`, `SqueezeLayer`"""
    torch.manual_seed(0)
    normalise = BatchRenorm1d(4)
    for _ in range(3):
        normalise(torch.randn(16, 4))
    last = nn.Sequential(NoisyLazyLinear(1), SqueezeLayer())
    last(torch.zeros(1, 4))
    policy = TensorDictSequential(
        TensorDictModule(normalise, in_keys=["observation"], out_keys=["features"]),
        ConsistentDropoutModule(p=0.5, in_keys="features", input_shape=torch.Size((4,))),
        TensorDictModule(last, in_keys=["features"], out_keys=["action"]),
    )
    return policy, TensorDict(OBSERVATION)


def ddpg() -> Pair:
    """`DdpgMlpActor`, `TanhModule`, and `DdpgMlpQNet` as the critic: `ActorCriticWrapper`"""
    torch.manual_seed(0)
    small: dict[str, Any] = {"num_cells": [8], "depth": 1}
    network = DdpgMlpActor(2, mlp_net_kwargs={"in_features": 4, **small})
    critic = DdpgMlpQNet(
        mlp_net_kwargs_net1={"in_features": 4, **small}, mlp_net_kwargs_net2={"in_features": 402, **small}
    )
    actor = TensorDictSequential(
        TensorDictModule(network, in_keys=["observation"], out_keys=["param"]),
        TanhModule(in_keys=["param"], out_keys=["action"], low=-2.0, high=1.0),
    )
    value = ValueOperator(critic, in_keys=["observation", "action"], out_keys=["state_value"])
    return ActorCriticWrapper(actor, value), TensorDict(OBSERVATION)


def ddpg_pixels() -> Pair:
    """`DdpgCnnActor`, and `DdpgCnnQNet` as the critic"""
    torch.manual_seed(0)
    small: dict[str, Any] = {"in_features": 4, "num_cells": [8], "depth": 1}
    network = DdpgCnnActor(2, conv_net_kwargs=PIXELS, mlp_net_kwargs=small, use_avg_pooling=True)
    critic = DdpgCnnQNet(conv_net_kwargs=PIXELS, mlp_net_kwargs={**small, "in_features": 6}, use_avg_pooling=True)
    policy = TensorDictSequential(
        TensorDictModule(network, in_keys=["pixels"], out_keys=["param", "features"]),
        TanhModule(in_keys=["param"], out_keys=["action"]),
        ValueOperator(critic, in_keys=["pixels", "action"], out_keys=["state_value"]),
    )
    return policy, TensorDict({"pixels": torch.zeros(3, 9, 9)})


def dueling() -> Pair:
    """`DuelingCnnDQNet` in a `QValueActor`"""
    torch.manual_seed(0)
    network = DuelingCnnDQNet(out_features=3, cnn_kwargs=PIXELS, mlp_kwargs={"num_cells": [8], "depth": 1})
    network(torch.zeros(1, 3, 9, 9))  # initialises its lazy layers
    return QValueActor(network, in_keys=["pixels"], spec=OneHot(3)), TensorDict({"pixels": torch.zeros(3, 9, 9)})


def actor_critic() -> Pair:
    """`ActorCriticOperator`: common layers, a stochastic actor and a critic"""
    common = SafeModule(layers(8), in_keys=["observation"], out_keys=["hidden"])
    parameters = SafeModule(nn.Sequential(nn.Linear(8, 4), NormalParamExtractor()), in_keys=["hidden"], out_keys=NORMAL)
    actor = ProbabilisticActor(
        parameters, in_keys=NORMAL, distribution_class=TanhNormal, return_log_prob=True, spec=Composite(action=None)
    )
    critic = ValueOperator(MLP(in_features=10, out_features=1, num_cells=[8]), in_keys=["hidden", "action"])
    return ActorCriticOperator(common, actor, critic), TensorDict(OBSERVATION)


def video() -> Pair:
    """`Conv3dNet`, and `Squeeze2dLayer` after convolutions of an image"""
    torch.manual_seed(0)
    image = nn.Sequential(nn.Conv2d(3, 4, 8), nn.ReLU(), Squeeze2dLayer())
    policy = TensorDictSequential(
        TensorDictModule(image, in_keys=["image"], out_keys=["seen"]),
        TensorDictModule(Conv3dNet(3, num_cells=[4], kernel_sizes=3), in_keys=["video"], out_keys=["moved"]),
        TensorDictModule(MLP(4 + 4 * 36 * 2, 2, num_cells=[8]), in_keys=["seen", "moved"], out_keys=["action"]),
    )
    return policy, TensorDict({"image": torch.zeros(3, 8, 8), "video": torch.zeros(3, 4, 8, 8)})


KINDS: dict[str, Callable[[], Pair]] = {
    factory.__name__: factory
    for factory in (
        c51, c51_hook, value_hook, hybrid, heads_of_torchrl, heads_of_torch, beta, gsde, in_evaluation_mode,
        ddpg, ddpg_pixels, dueling, actor_critic, video,
    )
}  # fmt: skip
