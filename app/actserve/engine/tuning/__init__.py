"""Tuning: the best batch size and number of threads on this host, from a short measurement.

A larger batch costs less per item until it no longer fits into the CPU's caches; beyond that size it only adds latency.
Measured when a policy is loaded, in about 40 ms if its calls are fast, unless `actserve tune` has measured it before. A
program whose calls are slow is also measured with all cores.

The weights of a large policy do not fit into the caches: a call reads them from memory, for one item or for many. So
its larger batches are measured, too, as long as they save a lot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter_ns, thread_time_ns

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
MUCH_CHEAPER = 0.8  # an item of a batch four times as large: then slow calls of the next size are measured, too
QUICK_NS = 3_000_000  # a call this short may block the event loop
MAX_WIDE_RATIO = 0.95  # all threads must shorten a call at least to this ratio
WIDE_ROUNDS, WIDE_NS = 5, 1_000_000_000  # for each size; after so long, two rounds are enough


@dataclass(frozen=True)
class Tuning:
    """`item_ns` are nanoseconds per item, by batch size, with one thread.

    `wide_ns` are the same with `threads` threads, of a program that is slow; empty if they were not measured.
    """

    item_ns: dict[int, int]
    threads: int = 1
    wide_ns: dict[int, int] = field(default_factory=dict)

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

    @property
    def wide_from(self) -> int | None:
        """The smallest batch size whose call is so much shorter with all threads that it is worth them; None: none."""
        return min(
            (size for size, ns in self.wide_ns.items() if ns <= MAX_WIDE_RATIO * self.item_ns[size]), default=None
        )


Run = Callable[[Mapping[str, Array]], Arrays]


def measure(run: Run, signature: Signature, min_ns: int = MIN_NS) -> Tuning:
    """The fastest of several calls of each size. Stops at the first size whose call takes longer than `SLOW_NS`, or
    longer than `QUICK_NS` if an item costs nearly as much as at a quarter of the size.
    """
    item_ns: dict[int, int] = {}
    for size in SIZES:
        if size > signature.max_batch:
            break
        inputs = blank_inputs(signature, size)
        calls_ns: list[int] = []
        while (total_ns := sum(calls_ns)) < min_ns or len(calls_ns) < (MIN_CALLS if total_ns < SLOW_NS else 2):
            calls_ns.append(_call_ns(run, inputs))
        fastest_ns, before_ns = min(calls_ns), item_ns.get(size // 4)
        item_ns[size] = fastest_ns // size
        is_much_cheaper = before_ns is None or item_ns[size] < MUCH_CHEAPER * before_ns
        if fastest_ns > SLOW_NS or (fastest_ns > QUICK_NS and not is_much_cheaper):
            break
    return Tuning(item_ns)


def measure_wide(tuning: Tuning, narrow: Run, wide: Run, threads: int, signature: Signature) -> Tuning:
    """`tuning` with the times of `wide`, the same program with so many `threads`.

    The calls of both take turns. A call counts with the CPU time of the thread that makes it, which has its share of
    the work: if other work holds a core for a while, a call with all threads waits for it, and is none the worse for it
    later. The fastest calls count.
    """
    item_ns, wide_ns = dict(tuning.item_ns), dict[int, int]()
    for size in tuning.item_ns:
        inputs = blank_inputs(signature, size)
        begun_ns = perf_counter_ns()
        wide(inputs)  # starts the threads
        pairs: list[tuple[int, int]] = []
        while len(pairs) < WIDE_ROUNDS and (len(pairs) < 2 or perf_counter_ns() - begun_ns < WIDE_NS):
            pairs.append((_call_ns(narrow, inputs, thread_time_ns), _call_ns(wide, inputs, thread_time_ns)))
        item_ns[size] = min(item_ns[size], *(narrow_ns // size for narrow_ns, _ in pairs))
        wide_ns[size] = min(ns // size for _, ns in pairs)
    return Tuning(item_ns, threads, wide_ns)


def _call_ns(run: Run, inputs: Arrays, clock_ns: Callable[[], int] = perf_counter_ns) -> int:
    begun_ns = clock_ns()
    run(inputs)
    return clock_ns() - begun_ns
