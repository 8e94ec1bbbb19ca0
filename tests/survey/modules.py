"""Modules of tensordict.nn, operators, layers of torch, and planners of chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl import modules as m
from torchrl.modules.models.exploration import gSDEModule

from tests.survey.parts import LOC, WIDTH, Family, Made, mlp, seen


class Gate(nn.Module):
    """An own module of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, goal: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.a(x) * self.b(goal).sigmoid()
        return out if scale is None else out * scale


class Attend(nn.Module):
    """Tokens (B, 6, 4) -> (B, 2)."""

    def __init__(self, network: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.network, self.last = network, last

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.network(tokens).mean(-2))
        return found


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return found


def modules() -> Family:
    goal = {"goal": torch.zeros(3)}
    simple: dict[str, tuple[Callable[[], Any], TensorDict]] = {
        "in_keys of a dict": (
            lambda: TensorDictModule(Gate(), {"observation": "x", "goal": "goal"}, ["action"], out_to_in_map=False),
            seen("observation", **goal),
        ),
        "keyword": (
            lambda: TensorDictModule(Gate(), ["observation", "goal", "scale"], ["action"]),
            seen("observation", **goal, scale=torch.ones(1)),
        ),
        "function": (
            lambda: TensorDictModule(lambda x: x[..., :2] * 2, ["observation"], ["action"]), seen("observation"),
        ),
        "nested keys": (
            lambda: TensorDictModule(mlp(2), [("robot", "joints")], [("robot", "action")]),
            TensorDict({"robot": {"joints": torch.zeros(WIDTH)}}),
        ),
        "select_out_keys": (
            lambda: TensorDictSequential(
                TensorDictModule(nn.Linear(WIDTH, 8), ["observation"], ["hidden"]),
                TensorDictModule(nn.Linear(8, 2), ["hidden"], ["action"]),
            ).select_out_keys("action"),
            seen("observation"),
        ),
        "TensorDictModuleWrapper": (
            lambda: m.SafeModule(mlp(2), in_keys=["observation"], out_keys=["action"]), seen("observation"),
        ),
        "partial_tolerant": (
            lambda: TensorDictSequential(
                TensorDictModule(mlp(2), ["observation"], ["action"]),
                TensorDictModule(nn.Linear(3, 2), ["absent"], ["other"]),
                partial_tolerant=True,
            ),
            seen("observation"),
        ),
        "ordered dict": (
            lambda: TensorDictSequential(
                {"first": TensorDictModule(nn.Linear(WIDTH, 8), ["observation"], ["hidden"]),
                 "second": TensorDictModule(nn.Linear(8, 2), ["hidden"], ["action"])}
            ),
            seen("observation"),
        ),
        "functions between": (
            lambda: TensorDictSequential(
                lambda td: td.set("scaled", td["observation"] * 2), TensorDictModule(mlp(2), ["scaled"], ["action"])
            ),
            seen("observation"),
        ),
        "lazy, initialised": (
            lambda: initialised(TensorDictModule(m.MLP(out_features=2, num_cells=[8]), ["observation"], ["action"])),
            seen("observation"),
        ),
        "ActorValueOperator": (lambda: actor_value(m.ActorValueOperator), seen("observation")),
        "ActorValueOperator, policy": (
            lambda: actor_value(m.ActorValueOperator).get_policy_operator(), seen("observation"),
        ),
        "ActorCriticWrapper": (lambda: actor_critic_wrapper(), seen("observation")),
        "ActorCriticWrapper, policy": (lambda: actor_critic_wrapper().get_policy_operator(), seen("observation")),
        "ValueOperator": (
            lambda: TensorDictSequential(
                m.Actor(mlp(2), in_keys=["observation"]), m.ValueOperator(mlp(1), in_keys=["observation"])
            ),
            seen("observation"),
        ),
        "ConsistentDropoutModule": (
            lambda: TensorDictSequential(
                m.ConsistentDropoutModule(p=0.3, in_keys="observation", input_shape=torch.Size((WIDTH,))),
                TensorDictModule(mlp(2), ["observation"], ["action"]),
            ),
            seen("observation"),
        ),
        "gSDE, learned sigma": (lambda: gsde(True), seen("observation")),
        "gSDE": (lambda: gsde(False), seen("observation")),
    }  # fmt: skip
    for name, (make, example) in simple.items():

        def policy(make: Any = make, example: Any = example) -> Made:
            return make(), example

        yield f"tensordict.nn {name}", policy

    tokens = TensorDict({"observation": torch.zeros(6, WIDTH)})
    layer: Any = partial(nn.TransformerEncoderLayer, WIDTH, 2, 8, batch_first=True)
    attending: dict[str, Callable[[], nn.Module]] = {
        "TransformerEncoder": lambda: nn.TransformerEncoder(layer(), 2),
        "TransformerEncoder, norm_first": lambda: nn.TransformerEncoder(
            layer(norm_first=True), 2, enable_nested_tensor=False
        ),
        "TransformerEncoder, gelu": lambda: nn.TransformerEncoder(layer(activation="gelu", dropout=0.0), 1),
        "MultiheadAttention": SelfAttention,
        "GroupNorm": lambda: nn.GroupNorm(2, 6),
        "BatchNorm1d": lambda: nn.BatchNorm1d(6),
        "Conv1d": lambda: nn.Conv1d(6, 6, 3, padding=1),
        "InstanceNorm1d": lambda: nn.InstanceNorm1d(6, affine=True),
        "PReLU": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.PReLU()),
        "Mish": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Mish()),
        "RMSNorm": lambda: nn.RMSNorm(WIDTH),
        "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
        "AdaptiveAvgPool1d": lambda: nn.AdaptiveAvgPool1d(WIDTH),
        "Bilinear": lambda: Twice(nn.Bilinear(WIDTH, WIDTH, WIDTH)),
    }
    for name, make in attending.items():

        def layers(make: Any = make) -> Made:
            return TensorDictModule(Attend(make(), nn.Linear(WIDTH, 2)), ["observation"], ["action"]), tokens

        yield f"layer {name}", layers

    def chunks(steps: int, replan: int | None) -> Made:
        model = m.models.ACTModel(WIDTH, 2, 6, hidden_dim=16, nheads=2, num_encoder_layers=1, num_decoder_layers=1)
        planner = TensorDictModule(model, ["observation"], ["action_chunk", "mu", "log_var"])
        options = {} if replan is None else {"replan_interval": replan}
        return m.MultiStepActorWrapper(planner, n_steps=steps, **options), seen("observation")

    for steps, replan in ((6, None), (6, 3), (6, 1)):
        yield f"ACT chunks of {steps} {replan or ''}", partial(chunks, steps, replan)
    for steps in (1, 5, 20):

        def diffuse(steps: int = steps) -> Made:
            return m.DiffusionActor(2, score_network=mlp(2, WIDTH + 3), num_steps=steps), seen("observation")

        yield f"DiffusionActor {steps}", diffuse


class Twice(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        return self.network(x, x)


def initialised(policy: Any) -> Any:
    policy(TensorDict({"observation": torch.zeros(1, WIDTH)}, [1]))
    return policy


def actor_value(kind: Any) -> Any:
    common = m.SafeModule(nn.Linear(WIDTH, 8), in_keys=["observation"], out_keys=["hidden"])
    body = m.SafeModule(nn.Sequential(nn.Linear(8, 4), NormalParamExtractor()), in_keys=["hidden"], out_keys=LOC)
    actor = m.ProbabilisticActor(body, in_keys=LOC, distribution_class=m.TanhNormal, return_log_prob=True)
    return kind(common, actor, m.ValueOperator(nn.Linear(8, 1), in_keys=["hidden"]))


def actor_critic_wrapper() -> Any:
    body = m.SafeModule(nn.Sequential(mlp(4), NormalParamExtractor()), in_keys=["observation"], out_keys=LOC)
    actor = m.ProbabilisticActor(body, in_keys=LOC, distribution_class=m.TanhNormal)
    return m.ActorValueOperator(
        m.SafeModule(nn.Identity(), in_keys=["observation"], out_keys=["hidden"]), actor,
        m.ValueOperator(mlp(1), in_keys=["hidden"]),
    )  # fmt: skip


def gsde(learned: bool) -> Any:
    mean = TensorDictModule(mlp(2), ["observation"], ["action"])
    noise = TensorDictModule(
        gSDEModule(2, WIDTH, learn_sigma=learned), ["action", "observation", "_eps_gSDE"], [*LOC, "action", "_eps_gSDE"]
    )
    actor = m.ProbabilisticActor(noise, in_keys=LOC, distribution_class=m.TanhNormal)
    return ProbabilisticTensorDictSequential(mean, *actor)
