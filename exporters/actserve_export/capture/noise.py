"""Random functions as functions of noise inputs: while a policy runs under `NoiseFromInputs`, torch draws nothing.

Each call of a random function of torch, with a result of (B, ...), asks `StepIO` for standard noise of that shape
("uniform" in 0..1, "normal", "exponential" or "gumbel", float32) and transforms it with the inverse of the distribution
function. A choice among probabilities uses the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014). Equal noise gives
equal actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torchrl.modules.distributions import TruncatedNormal, truncated_normal

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Distribution
from actserve_export.capture.step_io import StepIO


class NoiseFromInputs(TorchFunctionMode):
    """Replaces random functions. Raises `CaptureFailed` with the name of a function that has no replacement."""

    def __init__(self, io: StepIO) -> None:
        super().__init__()
        self._io = io

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None:
            return replacement(self._draw, *args, **kwargs)
        if func in _REFUSED:
            raise CaptureFailed(
                f"{resolve_name(func)} draws random numbers that cannot be made an input of the program; "
                "export the deterministic policy, or draw from uniform, normal or categorical distributions"
            )
        if torch.compiler.is_exporting() and _constant(func, args, kwargs):
            # Computed while tracing, so that a check of constants (low < high, say) becomes no branch in the graph.
            with _disable_current_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _draw(self, distribution: Distribution, shape: Any) -> Tensor:
        """Noise of `shape`. The batch must be the first axis that is not 1."""
        ones = 0
        for extent in shape:
            if isinstance(extent, int) and extent == 1 and self._io.batch != 1:
                ones += 1
                continue
            break
        item = tuple(int(extent) for extent in shape[ones + 1 :])
        if ones == len(shape) or (isinstance(shape[ones], int) and shape[ones] != self._io.batch):
            raise CaptureFailed(
                f"the policy draws random numbers of shape {tuple(shape)} for a batch of {self._io.batch}: "
                "expected the batch first, so that each item has its own"
            )
        noise = self._io.noise(distribution, item)
        return noise if ones == 0 else noise.reshape(shape)


@contextmanager
def without_value_checks() -> Iterator[None]:
    """While tracing, `TruncatedNormal` must not branch on values: it skips its checks and always applies its masks."""
    base = truncated_normal.TruncatedNormal
    branching = TruncatedNormal.log_prob, base.icdf, FakeTensor.tolist
    TruncatedNormal.log_prob, base.icdf = _truncated_log_prob, _truncated_icdf
    FakeTensor.tolist = lambda tensor: [] if tensor.dtype == torch.bool else branching[2](tensor)
    try:
        yield
    finally:
        TruncatedNormal.log_prob, base.icdf, FakeTensor.tolist = branching


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


def _constant(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call takes tensors, none of them traced, and changes none in place."""
    name = getattr(func, "__name__", "_")
    values = tree_leaves((args, kwargs))
    tensors = [value for value in values if isinstance(value, Tensor)]
    in_place = name.endswith("_") and not name.endswith("__")
    if not tensors or in_place or name in ("__setitem__", "__set__"):
        return False
    symbolic = any(isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) for value in values)
    return not symbolic and all(type(tensor) is Tensor for tensor in tensors)


Draw = Callable[[Distribution, Any], Tensor]


def _shape(sizes: tuple[Any, ...]) -> Any:
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, torch.Size)) else sizes


def _rand(draw: Draw, *sizes: Any, size: Any = None, **_: Any) -> Tensor:
    return draw("uniform", _shape(sizes) if size is None else size)


def _randn(draw: Draw, *sizes: Any, size: Any = None, **_: Any) -> Tensor:
    return draw("normal", _shape(sizes) if size is None else size)


def _rand_like(draw: Draw, like: Tensor, **_: Any) -> Tensor:
    return draw("uniform", like.shape).to(like.dtype)


def _randn_like(draw: Draw, like: Tensor, **_: Any) -> Tensor:
    return draw("normal", like.shape).to(like.dtype)


def _normal(draw: Draw, mean: Any, std: Any = 1.0, size: Any = None, **_: Any) -> Tensor:
    if size is None:
        size = mean.shape if isinstance(mean, Tensor) else std.shape
    return mean + std * draw("normal", size)


def _normal_(draw: Draw, target: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return target.copy_(mean + std * draw("normal", target.shape))


def _uniform_(draw: Draw, target: Tensor, *bounds: float, **named: Any) -> Tensor:
    low = bounds[0] if bounds else named.get("from", 0.0)
    high = bounds[1] if len(bounds) > 1 else named.get("to", 1.0)
    return target.copy_(low + (high - low) * draw("uniform", target.shape))


def _exponential_(draw: Draw, target: Tensor, lambd: float = 1.0, **_: Any) -> Tensor:
    return target.copy_(draw("exponential", target.shape) / lambd)


def _bernoulli(draw: Draw, probability: Tensor, **_: Any) -> Tensor:
    return (draw("uniform", probability.shape) < probability).to(probability.dtype)


def _bernoulli_(draw: Draw, target: Tensor, p: Any = 0.5, **_: Any) -> Tensor:
    return target.copy_(draw("uniform", target.shape) < p)


def _multinomial(draw: Draw, weights: Tensor, num_samples: int, replacement: bool = False, **_: Any) -> Tensor:
    """(B, n) weights -> (B, 1) indices."""
    if num_samples != 1:
        raise CaptureFailed(f"torch.multinomial: expected one sample an item; got {num_samples}")
    return (weights.log() + draw("gumbel", weights.shape)).argmax(-1, keepdim=True)


def _randint(draw: Draw, *arguments: Any, **named: Any) -> Tensor:
    """``randint([low,] high, size)``: the floor of a uniform number over the range."""
    size = named.get("size") or arguments[-1]
    rest = arguments if "size" in named else arguments[:-1]
    low, high = (0, rest[0]) if len(rest) == 1 else rest
    dtype = named.get("dtype") or torch.int64
    return (low + (draw("uniform", size) * (high - low)).floor()).to(dtype)


# Giles 2010, "Approximating the erfinv function", in single precision: the polynomials of the centre and the tails.
_CENTRE = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 2.1858087e-04, -1.25372503e-03,
           -4.17768164e-03, 0.246640727, 1.50140941)  # fmt: skip
_TAIL = (-2.00214257e-04, 1.00950558e-04, 1.34934322e-03, -3.67342844e-03, 5.73950773e-03, -7.6224613e-03,
         9.43887047e-03, 1.00167406, 2.83297682)  # fmt: skip


def _erfinv(_: Draw, x: Tensor) -> Tensor:
    """The inverse error function; ONNX has no operator for it."""
    w = -torch.log((1 - x) * (1 + x))
    return x * torch.where(w < 5, _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, torch.sqrt(w) - 3))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = coefficient + result * x
    return result


_REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    torch.rand: _rand,
    torch.randn: _randn,
    torch.rand_like: _rand_like,
    torch.randn_like: _randn_like,
    torch.normal: _normal,
    torch.bernoulli: _bernoulli,
    torch.multinomial: _multinomial,
    torch.randint: _randint,
    torch.Tensor.normal_: _normal_,
    torch.Tensor.uniform_: _uniform_,
    torch.Tensor.exponential_: _exponential_,
    torch.Tensor.bernoulli: _bernoulli,
    torch.Tensor.bernoulli_: _bernoulli_,
    torch.Tensor.multinomial: _multinomial,
    torch.erfinv: _erfinv,
    torch.Tensor.erfinv: _erfinv,
}
_REFUSED = {
    torch.randperm,
    torch.poisson,
    torch.binomial,
    torch._standard_gamma,
    torch._sample_dirichlet,
    torch.randint_like,
    torch.Tensor.random_,
    torch.Tensor.cauchy_,
    torch.Tensor.geometric_,
    torch.Tensor.log_normal_,
}
