"""Meters: what a policy's runtime calls came to, in whole numbers. They are added to once a batch and never reset."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Protocol

_MICROSECONDS = (25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000)
TIMES_NS = (*(us * 1000 for us in _MICROSECONDS), 10**9, 2_500_000_000, 5 * 10**9, 10**10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Histogram:
    """Whole numbers by size: `counts[i]` are at most `bounds[i]`, and more than the bound before; the last have none.

    `total`: their sum.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def add(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Queued(Protocol):
    size: int
    entered_ns: int


class Meters:
    """Of one program of one policy's version, however often it is loaded."""

    __slots__ = ("__weakref__", "queue_ns", "run_ns", "sizes")

    def __init__(self) -> None:
        self.sizes = Histogram(SIZES)  # items of a runtime call that succeeded; their sum: the actions
        self.run_ns = Histogram(TIMES_NS)  # such a call
        self.queue_ns = Histogram(TIMES_NS)  # a request of one, from when it was whole until the call

    def ran(self, batch: Iterable[Queued], begun_ns: int, run_ns: int) -> None:
        """A runtime call answered `batch`."""
        counts, items, waited_ns = self.queue_ns.counts, 0, 0
        for request in batch:
            ns = begun_ns - request.entered_ns
            counts[bisect_left(TIMES_NS, ns)] += 1
            waited_ns += ns
            items += request.size
        self.queue_ns.total += waited_ns
        self.sizes.add(items)
        self.run_ns.add(run_ns)
