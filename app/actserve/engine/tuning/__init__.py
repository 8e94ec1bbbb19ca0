"""Tuning: the best batch size on this host, from a short measurement.

A larger batch costs less per item until it no longer fits into the CPU's caches; beyond that size it only adds latency.
Measured in about 40 ms when a policy is loaded, unless `actserve tune` has measured it before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter_ns

from actserve.core.completion import blank_inputs
from actserve.core.signature import Array, Arrays, Signature

SIZES = (1, 2, 4, 8, 16, 32)
MIN_NS = 2_000_000  # measuring time per size
MIN_CALLS = 6  # per size: on a busy host most calls are interrupted, and the fastest one is not
SLOW_NS = 150_000_000  # after so long, two calls are enough
# Fixed cost of a batch outside its runtime call, with cold caches. From the CPU time per action of `pong`, in batches
# of 4, 8 and 16.
BATCH_NS = 60_000
MAX_COST_RATIO = 0.95  # a larger batch must reduce the cost per item at least to this ratio
QUICK_NS = 3_000_000  # a call this short may block the event loop


@dataclass(frozen=True)
class Tuning:
    """`item_ns` are nanoseconds per item, by batch size."""

    item_ns: dict[int, int]

    @cached_property
    def batch(self) -> int:
        """The best batch size: larger ones save too little."""
        cost_ns = {size: ns + BATCH_NS / size for size, ns in self.item_ns.items()}
        best, *larger = cost_ns
        for size in larger:
            if cost_ns[size] < MAX_COST_RATIO * cost_ns[best]:
                best = size
        return best

    @property
    def best_ns(self) -> int:
        """Nanoseconds per item at the best batch size."""
        return self.item_ns[self.batch]

    @property
    def quick(self) -> bool:
        """Whether a call may run in the event loop's thread."""
        return self.batch * self.best_ns < QUICK_NS


def measure(run: Callable[[Mapping[str, Array]], Arrays], signature: Signature, min_ns: int = MIN_NS) -> Tuning:
    """The fastest of several calls of each size. Stops at the first size whose call takes longer than `QUICK_NS`."""
    item_ns: dict[int, int] = {}
    for size in SIZES:
        if size > signature.max_batch:
            break
        inputs = blank_inputs(signature, size)
        calls_ns: list[int] = []
        while (total_ns := sum(calls_ns)) < min_ns or len(calls_ns) < (MIN_CALLS if total_ns < SLOW_NS else 2):
            begun_ns = perf_counter_ns()
            run(inputs)
            calls_ns.append(perf_counter_ns() - begun_ns)
        item_ns[size] = min(calls_ns) // size
        if min(calls_ns) > QUICK_NS:
            break
    return Tuning(item_ns)
