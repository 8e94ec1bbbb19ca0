"""Random functions as functions of noise inputs: while a policy runs under `NoiseFromInputs`, torch draws nothing.

Each call of a random function of torch, with a result of (B, ...), asks `StepIO` for standard noise of that shape
("uniform" in 0..1, "normal", "exponential" or "gumbel", float32) and transforms it with the inverse of the distribution
function. A choice among probabilities uses the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014). Equal noise gives
equal actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from actserve.core.signature import Distribution
from actserve_export.capture import decompositions
from actserve_export.capture.step_io import StepIO, Undrawable


class NoiseFromInputs(TorchFunctionMode):
    """Replaces random functions. Raises `Undrawable` with the name of a function that has no replacement."""

    def __init__(self, io: StepIO) -> None:
        super().__init__()
        self._io = io

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None:
            return replacement(self._draw, *args, **kwargs)
        if func in _REFUSED:
            name = resolve_name(func) or f"torch.{func.__name__}"
            raise Undrawable(
                f"{name} draws random numbers that cannot be made an input of the program: draw from uniform, normal "
                "or categorical distributions, or export the deterministic policy"
            )
        if torch.compiler.is_exporting() and _constant(func, args, kwargs):
            # Computed while tracing, so that a check of constants (low < high, say) becomes no branch in the graph.
            with _disable_current_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _draw(self, distribution: Distribution, shape: Any) -> Tensor:
        """Noise of `shape`, in which one axis is the batch, or the batch times the agents, (B * agents, ...)."""
        noise, axis = self._io.noise_along(distribution, tuple(shape))
        return noise.movedim(0, axis).reshape(shape)


def _constant(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call takes tensors, none of them traced, and changes none in place."""
    name = getattr(func, "__name__", "_")
    values = tree_leaves((args, kwargs))
    tensors = [value for value in values if isinstance(value, Tensor)]
    in_place = name.endswith("_") and not name.endswith("__")
    if not tensors or in_place or name in ("__setitem__", "__set__"):
        return False
    symbolic = any(isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) for value in values)
    # What torch.vmap wraps has the type Tensor, too.
    return not symbolic and all(
        type(tensor) is Tensor and not is_functorch_wrapped_tensor(tensor) for tensor in tensors
    )


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


def _cauchy_(draw: Draw, target: Tensor, median: float = 0.0, sigma: float = 1.0, **_: Any) -> Tensor:
    centred = draw("uniform", target.shape) - 0.5
    tail = (0.5 - centred.abs()).clamp_min(2**-25)  # exact, where the tangent's own argument is not
    far = centred.sign() / torch.tan(math.pi * tail)
    return target.copy_(median + sigma * torch.where(tail < 0.25, far, torch.tan(math.pi * centred)))


def _log_normal_(draw: Draw, target: Tensor, mean: float = 1.0, std: float = 2.0, **_: Any) -> Tensor:
    return target.copy_((mean + std * draw("normal", target.shape)).exp())


def _multinomial(draw: Draw, weights: Tensor, num_samples: int, replacement: bool = False, **_: Any) -> Tensor:
    """(B, n) weights -> (B, samples) indices. Without replacement these are the largest (Kool et al. 2019)."""
    scores = weights.log()
    if num_samples == 1:
        return (scores + draw("gumbel", scores.shape)).argmax(-1, keepdim=True)
    if replacement:
        *rows, count = scores.shape
        return (scores.unsqueeze(-2) + draw("gumbel", (*rows, num_samples, count))).argmax(-1)
    return (scores + draw("gumbel", scores.shape)).topk(num_samples, -1).indices


def _randint(draw: Draw, *arguments: Any, **named: Any) -> Tensor:
    """``randint([low,] high, size)``: the floor of a uniform number over the range."""
    size = named.get("size") or arguments[-1]
    rest = arguments if "size" in named else arguments[:-1]
    low, high = (0, rest[0]) if len(rest) == 1 else rest
    dtype = named.get("dtype") or torch.int64
    return (low + (draw("uniform", size) * (high - low)).floor()).to(dtype)


def _without_draws(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *arguments, **named: function(*arguments, **named)


def _dropout(draw: Draw, x: Tensor, p: float = 0.5, training: bool = True, **named: Any) -> Tensor:
    """Dropout that is on when the policy acts: `F.dropout(x, 0.5)`. In evaluation mode it does nothing."""
    if p == 0 or not named.get("train", training):
        return x
    return x * (draw("uniform", x.shape) >= p).to(x.dtype) / (1 - p)


def _gumbel_softmax(
    draw: Draw, logits: Tensor, tau: float = 1.0, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    soft = ((logits + draw("gumbel", logits.shape)) / tau).softmax(dim)
    if not hard:
        return soft
    return torch.zeros_like(logits).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
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
    torch.Tensor.cauchy_: _cauchy_,
    torch.Tensor.log_normal_: _log_normal_,
    torch.dropout: _dropout,
    torch.nn.functional.dropout: _dropout,
    torch.nn.functional.gumbel_softmax: _gumbel_softmax,
    **{function: _without_draws(made) for function, made in decompositions.REPLACEMENTS.items()},
}
_REFUSED = {
    torch.randperm,
    torch.poisson,
    torch.binomial,
    torch._standard_gamma,
    torch._sample_dirichlet,
    torch.randint_like,
    torch.Tensor.random_,
    torch.Tensor.geometric_,
}
