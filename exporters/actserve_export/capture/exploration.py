"""Replacements for TorchRL's exploration modules that choose among the actions of a spec, or keep their noise.

    EpsilonGreedy         noise (B, groups + choices) uniform or, for unbounded actions, noise_1 (B, *action) normal;
                          epsilon (B,)
    StateDependentNoise   is_init (B,), the noise's key (B, *agents, action, features), noise of that shape, normal
    WithoutDropout        nothing

See `actserve_export.capture.steps`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, MultiOneHot, OneHot, Unbounded
from torchrl.modules import ConsistentDropoutModule, EGreedyModule

from actserve.core.errors import CaptureFailed
from actserve_export.capture.decompositions import where
from actserve_export.capture.step_io import StepIO
from actserve_export.capture.steps import StepModule
from actserve_export.sources.keys import key_name

Shape = tuple[int, ...]


class EpsilonGreedy(StepModule):
    """`EGreedyModule` per item: a number u below epsilon takes a random action of the spec.

    There is one u for each entry of the tensordict that holds the action: for each item, or each agent of an item.
    """

    def __init__(self, original: EGreedyModule, io: StepIO) -> None:
        super().__init__(original, io)
        self.key, self.mask_key = original.action_key, original.action_mask_key
        spec = original.spec
        self.spec: Any = spec[original.action_key] if isinstance(spec, Composite) else spec
        self.epsilon = float(original.eps)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not self.exploring:
            return tensordict
        action = tensordict.get(self.key)
        inner = _ints(action.shape[1:])
        group = tensordict if isinstance(self.key, str) else tensordict.get(self.key[:-1])
        agents = _ints(group.batch_size[1:])
        epsilon = self.io.parameter("epsilon", self.epsilon, 0.0, 1.0).reshape(-1, *[1] * len(inner))
        width, groups = choices(self.spec, inner), math.prod(agents)
        noise = self.io.noise("uniform", (groups + width,))
        explores = noise[:, :groups].reshape(-1, *agents, *[1] * (len(inner) - len(agents))) < epsilon
        mask = tensordict.get(self.mask_key) if self.mask_key is not None else None
        drawn = random_action(self.spec, noise[:, groups:], inner, mask) if width else self.io.noise("normal", inner)
        tensordict.set(self.key, where(explores, drawn.to(action.dtype), action))
        return tensordict


def choices(spec: Any, inner: Shape) -> int:
    """The uniform numbers that a random action of shape `inner` takes; 0 for a normal distribution.

    Raises `CaptureFailed` for a spec whose random actions cannot be exported.
    """
    if isinstance(spec, MultiOneHot):
        return math.prod(inner[:-1]) * len(spec.space.boxes)
    if isinstance(spec, OneHot):
        return math.prod(inner[:-1])
    if isinstance(spec, (Bounded, Categorical)):
        return math.prod(inner)
    if isinstance(spec, Unbounded) and spec.dtype.is_floating_point:
        return 0
    raise CaptureFailed(f"epsilon-greedy over {type(spec).__name__}({spec.dtype}) cannot be exported")


def random_action(spec: Any, u: Tensor, inner: Shape, mask: Tensor | None) -> Tensor:
    """(B, choices) uniform -> (B, *inner), uniform over the spec, or over the actions that `mask` allows."""
    if isinstance(spec, Bounded):
        low, high = spec.space.low.expand(inner), spec.space.high.expand(inner)
        if spec.dtype.is_floating_point:
            return low + (high - low) * u.reshape(-1, *inner)
        span = (high.long() - low.long()).to(u.dtype)
        return low + torch.minimum((u.reshape(-1, *inner) * (span + 1)).floor(), span).long()
    if isinstance(spec, MultiOneHot):
        counts = [int(box.n) for box in spec.space.boxes]
        parts = u.reshape(-1, *inner[:-1], len(counts)).unbind(-1)
        masks = _split(mask, counts)
        return torch.cat([_one_hot(*each) for each in zip(parts, counts, masks, strict=True)], -1)
    if isinstance(spec, OneHot):
        return _one_hot(u.reshape(-1, *inner[:-1]), int(spec.space.n), mask)
    if isinstance(spec, MultiCategorical):
        if mask is None:
            return (u.reshape(-1, *inner) * spec.nvec.expand(inner)).floor()
        counts = spec.nvec.reshape(-1, spec.nvec.shape[-1])[0].tolist()
        parts = u.reshape(-1, *inner).unbind(-1)
        return torch.stack([_choice(*each) for each in zip(parts, counts, _split(mask, counts), strict=True)], -1)
    return _choice(u.reshape(-1, *inner), 2 if isinstance(spec, Binary) else int(spec.space.n), mask)


def _one_hot(u: Tensor, count: int, mask: Tensor | None) -> Tensor:
    return torch.nn.functional.one_hot(_choice(u, count, mask), count)


def _choice(u: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """(B, *rest) uniform -> (B, *rest) indices among `count`, or among those that the mask (B, *rest, n) allows."""
    if mask is None:
        return (u * count).floor().long()
    rank = (u.reshape(mask.shape[:-1]) * mask.sum(-1)).floor()  # the index among the allowed ones
    return (mask.cumsum(-1) > rank.unsqueeze(-1)).long().argmax(-1).reshape(u.shape)


def _split(mask: Tensor | None, counts: list[int]) -> list[Tensor] | list[None]:
    return [None] * len(counts) if mask is None else list(mask.split(counts, -1))


def _ints(shape: Any) -> Shape:
    return tuple(int(extent) for extent in shape)


class StateDependentNoise(StepModule):
    """A module around a `gSDEModule`: its noise is state, drawn anew where `is_init` (Raffin et al. 2020)."""

    def __init__(self, original: TensorDictModule, io: StepIO) -> None:
        super().__init__(original, io)
        self.module: Any = original.module
        self.noise_key = self.in_keys[2]
        self.in_keys, self.out_keys = self.in_keys[:2], self.out_keys[:3]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        mean, features = (tensordict.get(key) for key in self.in_keys)
        sigma = self.module.sigma.clamp_max(self.module.scale_max)  # (action, features)
        action = mean
        if self.exploring:
            name, shape = key_name(self.noise_key), (*_ints(features.shape[1:-1]), *_ints(sigma.shape))
            kept, drawn = self.io.state(name, shape, sigma.dtype), self.io.noise("normal", shape)
            noise = torch.where(self.io.is_init().reshape(-1, *[1] * len(shape)), drawn, kept)
            self.io.set_next_state(name, noise)
            action = mean + ((sigma * noise) @ features.unsqueeze(-1)).squeeze(-1)
        scale = (sigma * features.unsqueeze(-2)).pow(2).sum(-1).clamp_min(1e-5).sqrt()
        if self.module.transform is not None:
            action = self.module.transform(action)
        for key, value in zip(self.out_keys, (mean, scale, action), strict=True):
            tensordict.set(key, value)
        return tensordict


class WithoutDropout(StepModule):
    """`ConsistentDropoutModule` in evaluation mode, which needs no mask."""

    def __init__(self, original: ConsistentDropoutModule, io: StepIO) -> None:
        super().__init__(original, io)
        self.in_keys, self.out_keys = self.in_keys[:1], self.out_keys[:1]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set(self.out_keys[0], tensordict.get(self.in_keys[0]))
