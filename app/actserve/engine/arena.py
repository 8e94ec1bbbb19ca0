"""Arena: memory that request bodies are received into and programs read from.

It has rows, one for each observation that is being received or waits, and slots, one for the state of each episode that
the service keeps. The lowest free row is given out first, so that the rows of a batch are mostly neighbours: then the
batch is a view.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from time import perf_counter_ns
from typing import Protocol

import numpy as np

from actserve.core.completion import complete
from actserve.core.signature import IS_INIT, Array, Arrays, Signature

BATCHES = 4  # that there are rows for: one in the program, one that waits, and bodies that are still coming
AT_MOST_BYTES = 16 << 20  # of rows
SPARE_BLOCKS = 2  # of a size that are kept for the next request
SPARE_BYTES = 64 << 20  # of all sizes
SLOW_NS = 100_000_000  # an observation that takes longer to come need not have a row


class Guest(Protocol):
    """Whoever waits for a row."""

    def seat(self, row: int) -> bool:
        """`row` is yours until `Arena.release`; False: you have gone, and it is not."""


class Sender(Protocol):
    """Whose observation is coming into a row."""

    def unseat(self) -> int:
        """Give the row back, and have what has come elsewhere."""


class Seated(Protocol):
    """A request, perhaps of one item in the arena."""

    size: int
    row: int | None
    slot: int | None  # of its episode's state; None: the policy has none
    begins: bool  # the first step of its episode


class Arena:
    """Items of the only observation of a policy: `memory[row]` are the bytes of one, to receive into.

    What else the program takes is the same in every request that leaves it out.
    """

    def __init__(self, signature: Signature, batch: int) -> None:
        (spec,) = signature.observations
        self.item_bytes = spec.item_bytes
        self.waiting: deque[Guest] = deque()
        self.coming: dict[Sender, int] = {}  # since when, in nanoseconds; the first has been for longest
        rows = max(2, min(BATCHES * max(batch, 8), AT_MOST_BYTES // spec.item_bytes))
        self._name = spec.name
        self._items = spec.zeros(rows)
        self.bytes = self._items.reshape(rows, -1).view(np.uint8)  # (rows, item_bytes)
        self.memory = [memoryview(self.bytes[row]) for row in range(rows)]
        self._rest = complete(signature, {spec.name: self._items}, rows).inputs
        del self._rest[spec.name]
        self._free = list(range(rows))  # a heap
        self._spare: dict[int, list[bytearray]] = {}  # lent and given back, by the items in them
        self.spare_bytes = 0
        self._states = signature.state
        self._kept: Arrays = {state.spec.name: state.spec.zeros(0) for state in self._states}
        self._slots: list[int] = []  # free ones

    @staticmethod
    def suits(signature: Signature) -> bool:
        """Whether a request can be one observation and nothing else: nothing is drawn for it."""
        drawn = signature.noise and signature.exploration[0] == "random"
        begins = not signature.state or signature.is_init  # else the program could not be told
        return len(signature.observations) == 1 and begins and not drawn

    # rows

    @property
    def free(self) -> int:
        return len(self._free)

    def acquire(self) -> int | None:
        """The lowest free row, else that of a slow sender; None when all are in use."""
        return heappop(self._free) if self._free else self._unseat()

    def release(self, row: int) -> None:
        """To whoever waits first, else to the free ones."""
        free: int | None = row
        while self.waiting and free is not None:
            if self.waiting.popleft().seat(free):
                free = self._unseat()
        if free is not None:
            heappush(self._free, free)

    def _unseat(self) -> int | None:
        if self.coming:
            sender, since_ns = next(iter(self.coming.items()))
            if len(self.coming) == len(self.memory) or perf_counter_ns() - since_ns > SLOW_NS:
                del self.coming[sender]
                return sender.unseat()
        return None

    # memory beside the rows

    def lend(self, items: int) -> bytearray:
        """Memory for the observations of one request, whatever was in it; to be given back."""
        size_bytes = items * self.item_bytes
        blocks = self._spare.get(items)
        if not blocks:
            return bytearray(size_bytes)
        self.spare_bytes -= size_bytes
        return blocks.pop()

    def take_back(self, block: bytearray) -> None:
        if self.spare_bytes + len(block) > SPARE_BYTES:  # of sizes that may not come again
            self._spare.clear()
            self.spare_bytes = 0
        blocks = self._spare.setdefault(len(block) // self.item_bytes, [])
        if len(blocks) < SPARE_BLOCKS:
            blocks.append(block)
            self.spare_bytes += len(block)

    # slots

    def keep(self) -> int | None:
        """A slot for the state of an episode; None where there is no state. There is always one more."""
        if not self._states:
            return None
        if not self._slots:
            size = len(next(iter(self._kept.values())))
            self._slots = list(range(2 * size + 8, size - 1, -1))
            for state in self._states:
                more = state.spec.zeros(size + 9)
                self._kept[state.spec.name] = np.concatenate([self._kept[state.spec.name], more])
        return self._slots.pop()

    def forget(self, slot: int | None) -> None:
        if slot is not None:
            self._slots.append(slot)

    def state(self, slot: int) -> Arrays:
        """Each (1, *shape), a copy."""
        return {name: array[slot : slot + 1].copy() for name, array in self._kept.items()}

    def set_state(self, slot: int, state: Arrays) -> None:
        for name, array in self._kept.items():
            array[slot] = state[name][0]

    # batches

    def inputs(self, batch: Sequence[Seated]) -> Arrays:
        """Every input of the program, each (len(batch), *shape)."""
        rows = [item.row for item in batch if item.row is not None]
        first, size = rows[0], len(rows)
        neighbours = rows[-1] == first + size - 1 and rows == list(range(first, first + size))
        return self._complete(self._items[first : first + size] if neighbours else self._items[rows], batch)

    def inputs_of(self, item: Seated, observations: Array) -> Arrays:
        """The same for one request whose observations, their bytes, (n,), have no row."""
        return self._complete(observations.view(self._items.dtype).reshape(-1, *self._items.shape[1:]), [item])

    def _complete(self, observations: Array, batch: Sequence[Seated]) -> Arrays:
        inputs = {name: array[: len(observations)] for name, array in self._rest.items()}
        inputs[self._name] = observations
        if self._states:
            slots = [item.slot for item in batch if item.slot is not None]
            inputs |= {name: array[slots] for name, array in self._kept.items()}
            inputs[IS_INIT.name] = np.array([item.begins for item in batch])
        return inputs

    def scatter(self, batch: Sequence[Seated], results: Arrays) -> None:
        """Keep the new states of those in `batch` that have a slot. `results`: each (B, *shape)."""
        if not self._states:
            return
        slots, places, start = [], [], 0
        for item in batch:
            if item.slot is not None:
                slots.append(item.slot)
                places.append(start)
            start += item.size
        for state in self._states:
            self._kept[state.spec.name][slots] = results[state.output][places]
