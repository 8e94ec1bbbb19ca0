"""Budget: the CPU time that recording may take, as a share of one core."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns

CAPACITY_S = 10.0  # the budget of so long can be saved up
REFILL_S = 0.5  # once it is spent, no episode begins until the budget of so long is there
FIRST_NS_PER_BYTE = 1.0  # the assumed cost of writing, until some was measured
RESERVE = 0.5  # stateless requests leave this share of the capacity to episodes


class Budget:
    """A bucket that fills with `share` of the time that passes.

    It answers in the event loop, and is charged in the event loop and in the writer's thread, each with a counter of
    its own. The rows that wait to be written are counted at the cost of those written before.
    """

    def __init__(self, share: float, clock: Callable[[], int] = perf_counter_ns) -> None:
        self._share, self._clock = share, clock
        self._capacity_ns = self._left_ns = share * CAPACITY_S * 1e9
        self._counted_ns = 0  # the part of the spent time that `_left_ns` is without
        self._then_ns = clock()
        self._closed_until_ns = [0, 0]  # without `reserve`, and with it
        self.copying_ns = 0  # spent in the event loop
        self.copied_bytes = 0
        self.writing_ns = 0  # spent in the writer's thread
        self.written_bytes = 0

    @property
    def waiting_bytes(self) -> int:
        """The size of the rows that were copied and are not written yet."""
        return self.copied_bytes - self.written_bytes

    def is_closed(self) -> bool:
        """Whether `has_room(reserve=True)` would be False at once: the question that the fast path asks."""
        return self._clock() < self._closed_until_ns[1]

    def has_room(self, reserve: bool = False) -> bool:
        """Whether a new episode may begin. With `reserve`, only if others could begin after it."""
        now_ns = self._clock()
        if now_ns < self._closed_until_ns[reserve]:
            return False
        spent_ns = self.copying_ns + self.writing_ns
        gained_ns = (now_ns - self._then_ns) * self._share
        self._left_ns = min(self._capacity_ns, self._left_ns + gained_ns) - (spent_ns - self._counted_ns)
        self._then_ns, self._counted_ns = now_ns, spent_ns
        left_ns = self._left_ns - self.waiting_bytes * self._ns_per_byte
        if reserve:
            left_ns -= RESERVE * self._capacity_ns
        if left_ns <= 0:
            self._closed_until_ns[reserve] = now_ns + int(REFILL_S * 1e9 - left_ns / self._share)
        return left_ns > 0

    @property
    def _ns_per_byte(self) -> float:
        return self.writing_ns / self.written_bytes if self.written_bytes else FIRST_NS_PER_BYTE
