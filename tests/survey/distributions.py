"""Policies that draw actions from a distribution."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    TensorDictModule,
)
from torch import distributions, nn
from torchrl import modules as m
from torchrl.data import Bounded, OneHot

from tests.survey.parts import BOUNDS, LOC, NETWORKS, Family, Made, mlp, seen


class Parameters(nn.Module):
    """(B, 4) -> parameters by `split`, a function of (B, outputs)."""

    def __init__(self, outputs: int, split: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.network, self.split = mlp(outputs), split

    def forward(self, x: torch.Tensor) -> Any:
        return self.split(self.network(x))


def loc_scale(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loc, scale = x.chunk(2, -1)
    return loc, nn.functional.softplus(scale) + 0.1


def positive(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.softplus(x) + 0.1


def positive_pair(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = x.chunk(2, -1)
    return nn.functional.softplus(a) + 1.1, nn.functional.softplus(b) + 1.1


def tril(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loc, scale = loc_scale(x)
    return loc, torch.diag_embed(scale)


def with_mask(x: torch.Tensor) -> torch.Tensor:
    return x


def independent(kind: Any, **options: Any) -> Any:
    def make(**parameters: torch.Tensor) -> distributions.Distribution:
        return distributions.Independent(kind(**parameters, **options), 1)

    return make


LOGITS: dict[str, Any] = {"split": with_mask, "outputs": 5, "keys": ["logits"]}
PAIR: dict[str, Any] = {"split": loc_scale, "outputs": 4, "keys": LOC}
BETA: dict[str, Any] = {"split": positive_pair, "outputs": 4, "keys": ["concentration1", "concentration0"]}
DISTRIBUTIONS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "Categorical": (distributions.Categorical, LOGITS, {}),
    "torchrl OneHotCategorical": (m.OneHotCategorical, LOGITS, {}),
    "torch OneHotCategorical": (distributions.OneHotCategorical, LOGITS, {}),
    "Ordinal": (m.Ordinal, {**LOGITS, "keys": ["scores"]}, {}),
    "OneHotOrdinal": (m.OneHotOrdinal, {**LOGITS, "keys": ["scores"]}, {}),
    "MaskedCategorical": (m.MaskedCategorical, {**LOGITS, "mask": True}, {}),
    "MaskedOneHotCategorical": (m.MaskedOneHotCategorical, {**LOGITS, "mask": True}, {}),
    "OneHotCategorical by probs": (
        m.OneHotCategorical, {"split": lambda x: x.softmax(-1), "outputs": 5, "keys": ["probs"]}, {},
    ),
    "Categorical by probs": (
        distributions.Categorical, {"split": lambda x: x.softmax(-1), "outputs": 5, "keys": ["probs"]}, {},
    ),
    "Bernoulli": (independent(distributions.Bernoulli), LOGITS, {}),
    "Independent(Categorical)": (
        independent(distributions.Categorical),
        {**LOGITS, "split": lambda x: x.unflatten(-1, (2, 3)), "outputs": 6},
        {},
    ),
    "Normal": (distributions.Normal, PAIR, {}),
    "Independent(Normal)": (independent(distributions.Normal), PAIR, {}),
    "IndependentNormal": (m.IndependentNormal, PAIR, {}),
    "TanhNormal": (m.TanhNormal, PAIR, BOUNDS),
    "TanhNormal, plain": (m.TanhNormal, PAIR, {}),
    "TanhNormal, upscale": (m.TanhNormal, PAIR, {"upscale": 3.0, "tanh_loc": True}),
    "TanhNormal, bounds of numbers": (m.TanhNormal, PAIR, {"low": -2.0, "high": 0.5}),
    "TruncatedNormal": (m.TruncatedNormal, PAIR, BOUNDS),
    "TruncatedNormal, tanh_loc": (m.TruncatedNormal, PAIR, {**BOUNDS, "tanh_loc": True}),
    "Delta": (m.Delta, {"split": with_mask, "outputs": 2, "keys": ["param"]}, {}),
    "TanhDelta": (m.TanhDelta, {"split": with_mask, "outputs": 2, "keys": ["param"]}, BOUNDS),
    "MultivariateNormal": (
        distributions.MultivariateNormal, {"split": tril, "outputs": 4, "keys": ["loc", "scale_tril"]}, {},
    ),
    "Laplace": (distributions.Laplace, PAIR, {}),
    "Gumbel": (distributions.Gumbel, PAIR, {}),
    "LogNormal": (distributions.LogNormal, PAIR, {}),
    "LogisticNormal": (distributions.LogisticNormal, PAIR, {}),
    "Cauchy": (distributions.Cauchy, PAIR, {}),
    "Uniform": (
        distributions.Uniform,
        {"split": lambda x: (x[..., :2], x[..., :2] + 1 + x[..., 2:].exp()), "outputs": 4, "keys": ["low", "high"]},
        {},
    ),
    "Exponential": (
        distributions.Exponential, {"split": positive, "outputs": 2, "keys": ["rate"]}, {},
    ),
    "HalfNormal": (
        distributions.HalfNormal, {"split": positive, "outputs": 2, "keys": ["scale"]}, {},
    ),
    "Kumaraswamy": (distributions.Kumaraswamy, BETA, {}),
    "Weibull": (distributions.Weibull, {**BETA, "keys": ["scale", "concentration"]}, {}),
    "Beta": (independent(distributions.Beta), BETA, {}),
    "Gamma": (distributions.Gamma, {**BETA, "keys": ["concentration", "rate"]}, {}),
    "Dirichlet": (
        distributions.Dirichlet,
        {"split": lambda x: nn.functional.softplus(x) + 1.1, "outputs": 3, "keys": ["concentration"]},
        {},
    ),
    "RelaxedOneHotCategorical": (
        lambda **p: distributions.RelaxedOneHotCategorical(torch.tensor(0.5), **p), LOGITS, {},
    ),
    "StudentT": (lambda **p: distributions.StudentT(torch.tensor(3.0), **p), PAIR, {}),
}  # fmt: skip


def by_distribution() -> Family:
    modes = {"": {}, "RANDOM, log-prob": {"default_interaction_type": InteractionType.RANDOM, "return_log_prob": True}}
    for (name, (kind, given, options)), (mode, more) in product(DISTRIBUTIONS.items(), modes.items()):

        def policy(kind: Any = kind, given: Any = given, options: Any = options, more: Any = more) -> Made:
            keys = given["keys"]
            network = TensorDictModule(Parameters(given["outputs"], given["split"]), ["observation"], keys)
            masked = given.get("mask", False)
            in_keys: Any = {"logits": "logits", "mask": "mask"} if masked else keys
            actor = m.ProbabilisticActor(
                network, in_keys=in_keys, distribution_class=kind, distribution_kwargs=dict(options), **more
            )
            return actor, seen("observation", **({"mask": torch.ones(5, dtype=torch.bool)} if masked else {}))

        yield f"ProbabilisticActor {name} {mode}", policy

    for name, network in product(("TanhNormal", "OneHotCategorical"), ("LayerNorm", "residual", "ConvNet")):

        def on_network(name: str = name, network: str = network) -> Made:
            make, key = NETWORKS[network]
            continuous = name == "TanhNormal"
            body = nn.Sequential(make(4), NormalParamExtractor()) if continuous else make(5)
            keys = LOC if continuous else ["logits"]
            kind: Any = m.TanhNormal if continuous else m.OneHotCategorical
            spec = Bounded(-1, 1, (2,)) if continuous else OneHot(5)
            module = m.SafeModule(body, in_keys=[key], out_keys=keys)
            actor = m.SafeProbabilisticModule(spec=spec, in_keys=keys, out_keys=["action"], distribution_class=kind)
            return m.SafeProbabilisticTensorDictSequential(module, actor), seen(key)

        yield f"SafeProbabilisticTensorDictSequential {name} {network}", on_network

    for mapping, scale in product(("softplus", "exp", "relu", "biased_softplus_1.0", "none"), (1e-4, 0.5)):

        def extractor(mapping: str = mapping, scale: float = scale) -> Made:
            body = nn.Sequential(mlp(4), NormalParamExtractor(scale_mapping=mapping, scale_lb=scale))
            module = TensorDictModule(body, ["observation"], LOC)
            return m.ProbabilisticActor(module, in_keys=LOC, distribution_class=m.TanhNormal), seen("observation")

        if mapping != "none" or scale == 0.5:
            yield f"NormalParamExtractor {mapping} {scale}", extractor
