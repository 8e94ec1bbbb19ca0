"""Meters: histograms of a program's runtime calls, in whole numbers. Updated once per batch, never reset."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from actserve.core.limits import Reason, by_reason

_MICROSECONDS = (25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000)
TIMES_NS = (*(us * 1000 for us in _MICROSECONDS), 10**9, 2_500_000_000, 5 * 10**9, 10**10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Histogram:
    """`counts[i]` counts the values in (bounds[i - 1], bounds[i]]; the last count has no upper bound.

    `total` is the sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def add(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class QueuedRequest(Protocol):
    size: int
    entered_ns: int


class Meters:
    """The meters of one program of one version, over all times that it is loaded."""

    __slots__ = ("__weakref__", "limited", "queue_ns", "run_ns", "sizes")

    def __init__(self) -> None:
        self.sizes = Histogram(SIZES)  # items per successful runtime call; the total is the number of actions
        self.run_ns = Histogram(TIMES_NS)  # duration of such a call
        self.queue_ns = Histogram(TIMES_NS)  # per request: from its last byte to the start of the call
        self.limited: dict[Reason, int] = {}  # items that the limits changed; empty for a policy without limits

    def add_batch(self, batch: Iterable[QueuedRequest], begun_ns: int, run_ns: int) -> None:
        """Record a runtime call that answered `batch`."""
        counts, items, waited_ns = self.queue_ns.counts, 0, 0
        for request in batch:
            ns = begun_ns - request.entered_ns
            counts[bisect_left(TIMES_NS, ns)] += 1
            waited_ns += ns
            items += request.size
        self.queue_ns.total += waited_ns
        self.sizes.add(items)
        self.run_ns.add(run_ns)

    def add_limited(self, limited: NDArray[Any]) -> None:
        """Count the items of a call that the limits changed. `limited`: (B,) uint8, bits of `Reason`."""
        self.limited = self.limited or dict.fromkeys(Reason, 0)
        if limited.any():
            for reason, items in by_reason(limited).items():
                self.limited[reason] += items
