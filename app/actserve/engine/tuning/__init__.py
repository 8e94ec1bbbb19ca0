"""How many items a runtime call should have at most, from a short measurement on this host.

A larger batch costs less for each item until it outgrows the caches; a call on a batch that is larger than that only
makes everybody in it wait. Measured when a policy is loaded, in some 40 ms, unless `actserve tune` has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter_ns

from actserve.core.completion import complete
from actserve.core.signature import Array, Arrays, Signature

SIZES = (1, 2, 4, 8, 16, 32)
AT_LEAST_NS = 2_000_000  # for each size
CALLS = 6  # of each size at least: under load most of them are interrupted, and the quickest was not
ENOUGH_NS = 150_000_000  # for fewer calls, of what is slow
BATCH_NS = 60_000  # a batch's share of the work around its call, which finds the caches full of the program: from the
# CPU time an action of `pong` served in batches of 4, 8 and 16
WORTH = 0.95  # a batch that is twice as large must save so much
QUICK_NS = 3_000_000  # a call that the event loop may wait for


@dataclass(frozen=True)
class Tuning:
    """`item_ns`: nanoseconds an item takes, by batch size."""

    item_ns: dict[int, int]

    @cached_property
    def batch(self) -> int:
        """The size from which on larger ones are not worth it."""
        cost_ns = {size: ns + BATCH_NS / size for size, ns in self.item_ns.items()}
        best, *larger = cost_ns
        for size in larger:
            if cost_ns[size] < WORTH * cost_ns[best]:
                best = size
        return best

    @property
    def best_ns(self) -> int:
        """What an item takes in such a batch."""
        return self.item_ns[self.batch]

    @property
    def quick(self) -> bool:
        return self.batch * self.best_ns < QUICK_NS


def measure(
    run: Callable[[Mapping[str, Array]], Arrays], signature: Signature, at_least_ns: int = AT_LEAST_NS
) -> Tuning:
    """The quickest of several calls of each size; larger sizes are left out once one call takes too long."""
    item_ns: dict[int, int] = {}
    for size in SIZES:
        if size > signature.max_batch:
            break
        blank = {spec.name: spec.zeros(size) for spec in signature.observations}
        inputs = complete(signature, blank, size).inputs
        took: list[int] = []
        while (so_far := sum(took)) < at_least_ns or len(took) < (CALLS if so_far < ENOUGH_NS else 2):
            before = perf_counter_ns()
            run(inputs)
            took.append(perf_counter_ns() - before)
        item_ns[size] = min(took) // size
        if min(took) > QUICK_NS:
            break
    return Tuning(item_ns)
