"""Functions of torch that ONNX has no operator for, from operators that it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from actserve_export.capture import linalg

# Giles 2010, "Approximating the erfinv function", in single precision: the polynomials of the centre and the tails.
_CENTRE = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 2.1858087e-04, -1.25372503e-03,
           -4.17768164e-03, 0.246640727, 1.50140941)  # fmt: skip
_TAIL = (-2.00214257e-04, 1.00950558e-04, 1.34934322e-03, -3.67342844e-03, 5.73950773e-03, -7.6224613e-03,
         9.43887047e-03, 1.00167406, 2.83297682)  # fmt: skip
# Of g = 7.
_LANCZOS = (0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059,
            12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7)  # fmt: skip


def erfinv(x: Tensor) -> Tensor:
    """The inverse error function."""
    w = -torch.log((1 - x) * (1 + x))
    return x * torch.where(w < 5, _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, torch.sqrt(w) - 3))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = coefficient + result * x
    return result


def lgamma(x: Tensor) -> Tensor:
    """The logarithm of the gamma function (Lanczos 1964), by reflection below 1/2."""
    small = x < 0.5
    z = torch.where(small, 1 - x, x) - 1
    series = torch.full_like(z, _LANCZOS[0])
    for i, coefficient in enumerate(_LANCZOS[1:], 1):
        series = series + coefficient / (z + i)
    t = z + 7.5
    above = 0.5 * math.log(2 * math.pi) + (z + 0.5) * torch.log(t) - t + torch.log(series)
    return torch.where(small, math.log(math.pi) - torch.log(torch.sin(math.pi * x).abs()) - above, above)


def where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`torch.where`; ONNX Runtime has none of booleans."""
    if one.dtype == torch.bool:
        return (condition & one) | (~condition & other)
    return torch.where(condition, one, other)


def cross_entropy(scores: Tensor, target: Tensor, *rest: Any, **options: Any) -> Tensor:
    """`torch.nn.functional.cross_entropy`; the converter loses the shape of one loss for each item."""
    plain = not rest and options.get("weight") is None and not options.get("label_smoothing")
    if not plain or options.get("reduction") != "none" or scores.ndim < 2 or target.is_floating_point():
        return nn.functional.cross_entropy(scores, target, *rest, **options)
    ignored = target == options.get("ignore_index", -100)
    index = torch.where(ignored, 0, target).unsqueeze(1)
    losses = -torch.log_softmax(scores, 1).gather(1, index).squeeze(1)
    return torch.where(ignored, 0.0, losses)


def cumprod(x: Tensor, dim: int) -> Tensor:
    """The products of the first 1, 2, … n numbers along `dim`."""
    products: list[Tensor] = []
    for factor in x.unbind(dim):
        products.append(products[-1] * factor if products else factor)
    return torch.stack(products, dim)


def attention(*given: Any, **named: Any) -> Tensor:
    """Attention of (B, length, width) as attention with one head: ONNX has it for four axes only."""
    attend = nn.functional.scaled_dot_product_attention
    tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
    if tensors[0].ndim != 3:
        return attend(*given, **named)

    def with_head(value: Any) -> Any:
        return value.unsqueeze(1) if isinstance(value, Tensor) and value.ndim == 3 else value

    return attend(*map(with_head, given), **{name: with_head(value) for name, value in named.items()}).squeeze(1)


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    torch.erfinv: erfinv,
    torch.Tensor.erfinv: erfinv,
    torch.lgamma: lgamma,
    torch.Tensor.lgamma: lgamma,
    torch.special.gammaln: lgamma,
    torch.nn.functional.cross_entropy: cross_entropy,
    torch.nn.functional.scaled_dot_product_attention: attention,
    torch.cumprod: cumprod,
    torch.Tensor.cumprod: cumprod,
    torch.linalg.cholesky: linalg.cholesky,
    torch.linalg.solve_triangular: linalg.solve_triangular,
    torch.linalg.solve: linalg.solve,
    torch.linalg.slogdet: linalg.slogdet,
}
