"""The tables with which the programs of bundles draw the same random numbers as numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from actserve.bundles import ziggurat
from actserve.bundles.ziggurat import Ziggurat

DRAWS = 20_000
LAST_BITS = 4e-7  # in the tail, libraries round the logarithm another way


def bits(key: list[int]) -> Iterator[int]:
    """Random numbers of 32 bits: the halves of Philox's numbers, the lower one first."""
    generator = np.random.Philox(key=np.array(key, np.uint64))
    while True:
        number = int(generator.random_raw())
        yield number & 0xFFFFFFFF
        yield number >> 32


def uniform(source: Iterator[int]) -> Any:
    return np.float32(next(source) >> 8) * np.float32(2.0**-24)


def between(table: Ziggurat, layer: int, source: Iterator[int]) -> Any:
    """A density between those of the layer's edges."""
    below, above = table.density[layer], table.density[layer - 1]
    return np.float32((above - below) * uniform(source) + below)


def normal(source: Iterator[int]) -> Any:
    table = ziggurat.normal()
    while True:
        number = next(source)
        layer, negative, place = number & 0xFF, number >> 8 & 1, number >> 9 & 0x7FFFFF
        x = np.float32(place) * table.width[layer]
        if place >= table.inside[layer]:
            if layer == 0:
                return tail(place >> 8 & 1, source)
            if between(table, layer, source) >= math.exp(-0.5 * float(x) ** 2):
                continue
        return -x if negative else x


def tail(negative: int, source: Iterator[int]) -> Any:
    edge = ziggurat.normal().tail
    while True:
        x = np.float32(-1 / edge) * np.log1p(-uniform(source))
        y = -np.log1p(-uniform(source))
        if y + y > x * x:
            return np.float32(-(edge + x) if negative else edge + x)


def exponential(source: Iterator[int]) -> Any:
    table = ziggurat.exponential()
    while True:
        number = next(source) >> 1
        layer, place = number & 0xFF, number >> 8
        x = np.float32(place) * table.width[layer]
        if place < table.inside[layer]:
            return x
        if layer == 0:
            return np.float32(np.float32(table.tail) - np.log1p(-uniform(source)))
        if between(table, layer, source) < math.exp(-float(x)):
            return x


@pytest.mark.parametrize("draw", [normal, exponential])
def test_the_tables_give_numpys_numbers(draw: Any) -> None:
    key = [2**63 - 25, 3]
    generator = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
    expected = getattr(generator, f"standard_{draw.__name__}")(DRAWS, np.float32)
    source = bits(key)
    found = np.array([draw(source) for _ in range(DRAWS)], np.float32)
    np.testing.assert_allclose(found, expected, rtol=LAST_BITS)
    edge = getattr(ziggurat, draw.__name__)().tail
    inner = np.abs(expected) < edge
    assert np.array_equal(found[inner], expected[inner])
    assert not inner.all(), "the tail was drawn from, too"
