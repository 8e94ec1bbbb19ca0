"""Ziggurats: the tables with which numpy draws float32 normal and exponential samples.

Marsaglia and Tsang 2000, "The Ziggurat Method for Generating Random Variables", with 256 layers of equal area. A draw
takes the lowest 8 bits of a random number as its layer, and the 23 highest bits as its place in the layer. Programs
that draw from the same bits with these tables get numpy's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache

import numpy as np

from actserve.core.signature import Array

LAYERS = 256
PLACES = 2**23  # in a layer
_DIGITS = 40  # the layers are computed one from the other, so errors add up
# Where the layer with the tail begins, so that all layers have the same area (Marsaglia and Tsang, computed to more
# digits).
_NORMAL = Decimal("3.6541528853610087963519472518")
_EXPONENTIAL = Decimal("7.6971174701310497140446280481")


@dataclass(frozen=True)
class Ziggurat:
    """One distribution's tables, each (256,): a draw of place p in layer i is p * `width[i]`.

    It is accepted if p < `inside[i]`, where the density is above the layer. `density` is at the layer's edge. Layer 0
    has the tail, which begins at `tail`.
    """

    inside: Array  # uint32
    width: Array  # float32
    density: Array  # float32
    tail: float


@cache
def normal() -> Ziggurat:
    """The standard normal distribution's right half."""
    with localcontext(prec=_DIGITS):
        tail = _NORMAL
        for i in range(400, 0, -1):  # Mills' ratio, as Laplace's continued fraction
            tail = _NORMAL + i / tail
        area = (_NORMAL + 1 / tail) * _bell(_NORMAL)
        return _layers(_NORMAL, area, _bell, lambda y: (-2 * y.ln()).sqrt())


@cache
def exponential() -> Ziggurat:
    """The standard exponential distribution."""
    with localcontext(prec=_DIGITS):
        area = (_EXPONENTIAL + 1) * (-_EXPONENTIAL).exp()
        return _layers(_EXPONENTIAL, area, lambda x: (-x).exp(), lambda y: -y.ln(), digits=9)  # as numpy's table


def _bell(x: Decimal) -> Decimal:
    return (-x * x / 2).exp()


def _layers(
    tail: Decimal,
    area: Decimal,
    density: Callable[[Decimal], Decimal],
    inverse: Callable[[Decimal], Decimal],
    digits: int = _DIGITS,
) -> Ziggurat:
    edges = [area / density(tail)] + [tail] * (LAYERS - 1)  # the lowest layer is as wide as if it had no tail
    for i in range(LAYERS - 2, 0, -1):
        edges[i] = inverse(area / edges[i + 1] + density(edges[i + 1]))
    inside = [tail / edges[0], Decimal(0)] + [edges[i - 1] / edges[i] for i in range(2, LAYERS)]
    heights = [Decimal(1), *(density(edge) for edge in edges[1:])]
    return Ziggurat(
        np.array([int(share * PLACES) for share in inside], np.uint32),
        np.array([_float32(edge / PLACES, digits) for edge in edges]),
        np.array([_float32(height, digits) for height in heights]),
        float(tail),
    )


def _float32(value: Decimal, digits: int) -> np.float32:
    return np.float32(f"{value:.{digits - 1}e}")
