"""Randomness, lifted out: while a policy runs under `Lifted`, torch's random functions take the program's noise inputs.

Each call becomes a function of standard noise: the inverse of the distribution function, or, for a choice among
probabilities, the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014), so that equal noise gives equal actions.
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
from actserve_export.capture.ports import Ports


class Lifted(TorchFunctionMode):
    """Serves random functions from `ports`. Raises `CaptureFailed` for those that cannot be lifted, by name."""

    def __init__(self, ports: Ports) -> None:
        super().__init__()
        self._ports = ports

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        lifted = _LIFTED.get(func)
        if lifted is not None:
            return lifted(self._draw, *args, **kwargs)
        if func in _REFUSED:
            raise CaptureFailed(
                f"{resolve_name(func)} draws random numbers that cannot be made an input of the program; "
                "export the deterministic policy, or draw from uniform, normal or categorical distributions"
            )
        if torch.compiler.is_exporting() and _constant(func, args, kwargs):
            # What depends on no input is computed now, so that a check on it (low < high, say) is no branch.
            with _disable_current_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _draw(self, distribution: Distribution, shape: Any) -> Tensor:
        """Noise of `shape`, which must have the batch first, after axes of 1 at most."""
        ones = 0
        for extent in shape:
            if isinstance(extent, int) and extent == 1 and self._ports.batch != 1:
                ones += 1
                continue
            break
        item = tuple(int(extent) for extent in shape[ones + 1 :])
        if ones == len(shape) or (isinstance(shape[ones], int) and shape[ones] != self._ports.batch):
            raise CaptureFailed(
                f"the policy draws random numbers of shape {tuple(shape)} for a batch of {self._ports.batch}: "
                "expected the batch first, so that each item has its own"
            )
        noise = self._ports.noise(distribution, item)
        return noise if ones == 0 else noise.reshape(shape)


@contextmanager
def unchecked() -> Iterator[None]:
    """While tracing, TruncatedNormal branches on no values: it checks no bounds, and masks what needs no mask."""
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
    """The base distribution's `icdf`, without writing behind autograd's back."""
    sample = self._from_std_rv(truncated_normal.TruncatedStandardNormal.icdf(self, value))
    return torch.maximum(torch.minimum(sample, self._non_std_b), self._non_std_a)


def _constant(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call takes tensors, all of them plain ones, and changes none."""
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


# Giles 2010, "Approximating the erfinv function": single precision, the centre and the tails.
_CENTRE = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 2.1858087e-04, -1.25372503e-03,
           -4.17768164e-03, 0.246640727, 1.50140941)  # fmt: skip
_TAIL = (-2.00214257e-04, 1.00950558e-04, 1.34934322e-03, -3.67342844e-03, 5.73950773e-03, -7.6224613e-03,
         9.43887047e-03, 1.00167406, 2.83297682)  # fmt: skip


def _erfinv(_: Draw, x: Tensor) -> Tensor:
    """The inverse error function, which ONNX does not have."""
    w = -torch.log((1 - x) * (1 + x))
    return x * torch.where(w < 5, _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, torch.sqrt(w) - 3))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = coefficient + result * x
    return result


_LIFTED: dict[Any, Callable[..., Tensor]] = {
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
