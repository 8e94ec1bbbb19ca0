"""Checks of values in TorchRL's distributions and heads, which a program cannot make: it does not branch on values.

Each function here gives what the original gives for valid values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torchrl.modules import DistributionalQValueModule, LLMMaskedCategorical
from torchrl.modules.distributions import TruncatedNormal, continuous, truncated_normal


@contextmanager
def without_value_checks() -> Iterator[None]:
    """While a policy is traced, its distributions and heads do not branch on values."""
    originals = [(owner, name, inspect.getattr_static(owner, name)) for owner, name, _ in _REPLACEMENTS]
    for owner, name, replacement in _REPLACEMENTS:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _truncated_log_prob(self: Any, value: Tensor) -> Tensor:
    """`TruncatedNormal.log_prob`, (..., n) -> (...), without its branch."""
    margin = self.base_dist._dtype_min_gt_0
    low, high = self.base_dist._non_std_a + margin, self.base_dist._non_std_b - margin
    outside = ((self.low > value) | (self.high < value)).any(-1)
    inside = torch.distributions.Independent.log_prob(self, torch.maximum(torch.minimum(value, high), low))
    return torch.where(outside, torch.full_like(inside, -math.inf), inside)


def _truncated_icdf(self: Any, value: Tensor) -> Tensor:
    """The base distribution's `icdf`, without its write to `.data`."""
    sample = self._from_std_rv(truncated_normal.TruncatedStandardNormal.icdf(self, value))
    return torch.maximum(torch.minimum(sample, self._non_std_b), self._non_std_a)


def _expected_values(self: Any, log_probabilities: Tensor, support: Tensor | None = None) -> Tensor:
    """C51's (..., atoms, actions) -> (..., actions), without the check that probabilities are at most 1."""
    atoms = self.support if support is None else support
    return (log_probabilities.exp() * atoms.unsqueeze(-1)).sum(-2)


def _finite_categorical(self: Any) -> Any:
    """`LLMMaskedCategorical._sampling_dist`: infinities are always replaced, which changes no finite number."""
    logits = self._sampling_logits
    finite = torch.where(logits.isnan(), 0.0, logits.clamp(-1e4, 1e4))
    return torch.distributions.Categorical(logits=torch.where(logits.abs() < math.inf, logits, finite))


def _listed(tensor: FakeTensor, original: Any = Tensor.tolist) -> Any:
    """A list of booleans that are not known: `TruncatedStandardNormal` collects warnings by it."""
    return [] if tensor.dtype == torch.bool else original(tensor)


_REPLACEMENTS: tuple[tuple[Any, str, Any], ...] = (
    (TruncatedNormal, "log_prob", _truncated_log_prob),
    (truncated_normal.TruncatedNormal, "icdf", _truncated_icdf),
    (FakeTensor, "tolist", _listed),
    (DistributionalQValueModule, "_support_expected", _expected_values),
    (LLMMaskedCategorical, "_sampling_dist", property(_finite_categorical)),
    # It raises for a limit of torch before 2.6, whatever torch's version.
    (continuous, "_err_compile_safetanh", lambda: None),
)
