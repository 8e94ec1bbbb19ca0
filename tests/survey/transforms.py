"""Policies behind the transforms of an environment."""

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
from torchrl.envs import TransformedEnv
from torchrl.envs import transforms as t

from tests.replay import ReplayEnv
from tests.survey.parts import LOC, WIDTH, Family, Made, mlp

PIXELS = {"pixels": Bounded(0, 255, (8, 8, 3), dtype=torch.uint8)}
VECTOR = {"observation": Unbounded((WIDTH,))}
DOUBLE = {"observation": Unbounded((WIDTH,), dtype=torch.float64)}
TWO = {"a": Unbounded((2,)), "b": Unbounded((2,))}


def norm_v2() -> Any:
    transform = t.VecNormV2(in_keys=["observation"])
    environment = TransformedEnv(ReplayEnv(VECTOR, Bounded(-1, 1, (2,))), transform)
    environment.rollout(20)
    return transform.clone().freeze()


def image(*more: Any) -> Callable[[], list[Any]]:
    return lambda: [
        t.ToTensorImage(in_keys=["pixels"]),
        *(make() for make in more),
        t.FlattenObservation(-3, -1, in_keys=["pixels"]),
    ]


ENVIRONMENTS: dict[str, tuple[Callable[[], list[Any]], dict[str, Any], str, int]] = {
    "none": (list, VECTOR, "observation", 4),
    "StepCounter": (lambda: [t.StepCounter()], VECTOR, "observation", 4),
    "RewardSum": (lambda: [t.RewardSum()], VECTOR, "observation", 4),
    "InitTracker": (lambda: [t.InitTracker()], VECTOR, "observation", 4),
    "RewardScaling": (lambda: [t.RewardScaling(0.0, 2.0)], VECTOR, "observation", 4),
    "RewardClipping": (lambda: [t.RewardClipping(-1, 1)], VECTOR, "observation", 4),
    "SignTransform of rewards": (lambda: [t.SignTransform(in_keys=["reward"])], VECTOR, "observation", 4),
    "TensorDictPrimer": (lambda: [t.TensorDictPrimer(extra=Unbounded((3,)))], VECTOR, "observation", 4),
    "FiniteTensorDictCheck": (lambda: [t.FiniteTensorDictCheck()], VECTOR, "observation", 4),
    "Timer": (lambda: [t.Timer()], VECTOR, "observation", 4),
    "VecNorm of rewards": (lambda: [t.VecNorm(in_keys=["reward"])], VECTOR, "observation", 4),
    "DoubleToFloat": (lambda: [t.DoubleToFloat()], DOUBLE, "observation", 4),
    "DoubleToFloat, keys": (lambda: [t.DoubleToFloat(in_keys=["observation"])], DOUBLE, "observation", 4),
    "DTypeCastTransform": (
        lambda: [t.DTypeCastTransform(torch.float64, torch.float32, in_keys=["observation"])], DOUBLE, "observation", 4,
    ),
    "ObservationNorm": (lambda: [t.ObservationNorm(0.5, 2.0, in_keys=["observation"])], VECTOR, "observation", 4),
    "ObservationNorm, standard": (
        lambda: [t.ObservationNorm(torch.ones(4), 3 * torch.ones(4), in_keys=["observation"], standard_normal=True)],
        VECTOR, "observation", 4,
    ),
    "VecNormV2": (lambda: [norm_v2()], VECTOR, "observation", 4),
    "CatFrames": (lambda: [t.CatFrames(3, -1, in_keys=["observation"])], VECTOR, "observation", 12),
    "CatFrames, constant": (
        lambda: [t.CatFrames(3, -1, in_keys=["observation"], padding="constant", padding_value=0.5)],
        VECTOR, "observation", 12,
    ),
    "CatFrames, out_keys": (
        lambda: [t.CatFrames(2, -1, in_keys=["observation"], out_keys=["stack"])], VECTOR, "stack", 8,
    ),
    "CatTensors": (lambda: [t.CatTensors(["a", "b"], "both")], TWO, "both", 4),
    "Stack": (
        lambda: [t.Stack(["a", "b"], "both", dim=-2), t.FlattenObservation(-2, -1, in_keys=["both"])], TWO, "both", 4,
    ),
    "RenameTransform": (lambda: [t.RenameTransform(["observation"], ["seen"])], VECTOR, "seen", 4),
    "ExcludeTransform": (lambda: [t.ExcludeTransform("b")], TWO, "a", 2),
    "SelectTransform": (lambda: [t.SelectTransform("b")], TWO, "b", 2),
    "UnsqueezeTransform": (
        lambda: [t.UnsqueezeTransform(-1, in_keys=["observation"]), t.SqueezeTransform(-1, in_keys=["observation"])],
        VECTOR, "observation", 4,
    ),
    "UnaryTransform": (
        lambda: [t.UnaryTransform(["observation"], ["root"], fn=lambda x: x.abs().sqrt())], VECTOR, "root", 4,
    ),
    "ClipTransform": (lambda: [t.ClipTransform(in_keys=["observation"], low=-0.5, high=0.5)], VECTOR, "observation", 4),
    "ClipTransform, low": (lambda: [t.ClipTransform(in_keys=["observation"], low=0.0)], VECTOR, "observation", 4),
    "SignTransform": (lambda: [t.SignTransform(in_keys=["observation"])], VECTOR, "observation", 4),
    "TimeMaxPool": (lambda: [t.TimeMaxPool(in_keys=["observation"], T=2)], VECTOR, "observation", 4),
    "NextObservationDelta": (lambda: [t.NextObservationDelta(in_keys=["observation"])], VECTOR, "observation", 4),
    "TargetReturn": (lambda: [t.TargetReturn(5.0)], VECTOR, "observation", 4),
    "norm and frames": (
        lambda: [t.ObservationNorm(0.5, 2.0, in_keys=["observation"]), t.CatFrames(2, -1, in_keys=["observation"])],
        VECTOR, "observation", 8,
    ),
    "ToTensorImage": (image(), PIXELS, "pixels", 192),
    "GrayScale": (image(lambda: t.GrayScale(in_keys=["pixels"])), PIXELS, "pixels", 64),
    "CatFrames of pixels": (image(lambda: t.CatFrames(2, -3, in_keys=["pixels"])), PIXELS, "pixels", 384),
    "ObservationNorm of pixels": (
        image(lambda: t.ObservationNorm(0.4, 0.2, in_keys=["pixels"])), PIXELS, "pixels", 192,
    ),
    "PermuteTransform": (image(lambda: t.PermuteTransform((-1, -2, -3), in_keys=["pixels"])), PIXELS, "pixels", 192),
    "gray frames": (
        image(lambda: t.GrayScale(in_keys=["pixels"]), lambda: t.CatFrames(4, -3, in_keys=["pixels"])),
        PIXELS, "pixels", 256,
    ),
}  # fmt: skip


def transformed() -> Family:
    for (name, (make, observations, key, width)), stochastic in product(ENVIRONMENTS.items(), (False, True)):

        def policy(
            make: Any = make, seen: Any = observations, key: str = key, n: int = width, s: bool = stochastic
        ) -> Made:
            environment = TransformedEnv(ReplayEnv(seen, Bounded(-1, 1, (2,))), t.Compose(*make()))
            environment.rollout(2)
            if s:
                body = TensorDictModule(nn.Sequential(mlp(4, n), NormalParamExtractor()), [key], LOC)
                actor: Any = m.ProbabilisticActor(
                    body, in_keys=LOC, distribution_class=m.TanhNormal, return_log_prob=True
                )
            else:
                actor = TensorDictModule(nn.Sequential(mlp(2, n), nn.Tanh()), [key], ["action"])
            return TensorDictSequential(environment.transform, actor), environment.base_env.fake_tensordict()

        yield f"env.transform {name} {'TanhNormal' if stochastic else ''}", policy
