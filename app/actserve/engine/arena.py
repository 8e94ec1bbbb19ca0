"""Arena: memory that request bodies are received into and programs read from.

It has rows, one for each observation that is being received or queued, and slots, one for the state of each episode
that the service keeps. It hands out the lowest free row first, so the rows of a batch are mostly adjacent, and the
batch is a view instead of a copy.
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
from actserve.engine.malloc import allocate

BATCHES = 4  # there are rows for so many: one in the program, one queued, and two being received
MAX_BYTES = 16 << 20  # of all rows
SPARE_BLOCKS = 2  # kept for the next request of the same size
SPARE_BYTES = 64 << 20  # of all spare blocks
SLOW_NS = 100_000_000  # an observation that takes longer to come may lose its row


class Waiter(Protocol):
    """A request that waits for a row."""

    def seat(self, row: int) -> bool:
        """Take `row`, until `Arena.release`. False: the request was abandoned and takes none."""


class Sender(Protocol):
    """A request whose observation is being received into a row."""

    def unseat(self) -> int:
        """Move the observation elsewhere and return the row."""


class Seated(Protocol):
    """A request of a batch; with a row, its only item is in the arena."""

    size: int
    row: int | None
    slot: int | None  # of its episode's state; None: the policy has no state
    begins: bool  # the first step of its episode


class Arena:
    """Rows for the only observation of a policy: `memory[row]` holds the bytes of one item.

    The program's other inputs have their defaults: a request that sets them does not use the arena.
    """

    def __init__(self, signature: Signature, batch: int) -> None:
        (spec,) = signature.observations
        self.item_bytes = spec.item_bytes
        self.waiting: deque[Waiter] = deque()
        self.coming: dict[Sender, int] = {}  # when each began, in nanoseconds; the oldest comes first
        rows = max(2, min(BATCHES * max(batch, 8), MAX_BYTES // spec.item_bytes))
        self._name = spec.name
        self._spec = spec
        self._items = np.zeros((rows, *spec.shape), spec.wire_dtype)
        self.bytes = self._items.reshape(rows, -1).view(np.uint8)  # (rows, item_bytes)
        self.memory = [memoryview(self.bytes[row]) for row in range(rows)]
        self._signature = signature
        self._defaults: Arrays = {}  # of the other inputs, each (n, *shape)
        self._defaults_size = 0
        self._extend_defaults(rows)
        self._free = list(range(rows))  # a heap
        self._spare: dict[int, list[Array]] = {}  # blocks for the next request, by their number of items
        self.spare_bytes = 0
        self._states = signature.state
        self._kept: Arrays = {state.spec.name: state.spec.zeros(0) for state in self._states}
        self._slots: list[int] = []  # free ones

    @staticmethod
    def suits(signature: Signature) -> bool:
        """Whether a request can consist of one observation alone: no noise is drawn for it by default."""
        draws = signature.draws(signature.exploration[0])
        resets = not signature.state or signature.is_init  # otherwise an episode's beginning could not be expressed
        return len(signature.observations) == 1 and resets and not draws

    # rows

    @property
    def free(self) -> int:
        return len(self._free)

    def acquire(self) -> int | None:
        """The lowest free row, or the row of a slow sender; None if all are in use."""
        return heappop(self._free) if self._free else self._unseat()

    def release(self, row: int) -> None:
        """Give the row to the first request that waits, or back to the free rows."""
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

    # memory for batches of one request

    def lend(self, items: int) -> Array:
        """Uninitialised memory for the observations of one request, (n,) uint8; `take_back` it later."""
        blocks = self._spare.get(items)
        if not blocks:
            return allocate(items * self.item_bytes)
        block = blocks.pop()
        self.spare_bytes -= len(block)
        return block

    def take_back(self, block: Array) -> None:
        if self.spare_bytes + len(block) > SPARE_BYTES:  # some sizes may not come again
            self.drop_spare()
        blocks = self._spare.setdefault(len(block) // self.item_bytes, [])
        if len(blocks) < SPARE_BLOCKS:
            blocks.append(block)
            self.spare_bytes += len(block)

    def drop_spare(self) -> None:
        """Free the spare blocks."""
        self._spare.clear()
        self.spare_bytes = 0

    # slots

    def keep(self) -> int | None:
        """A slot for the state of an episode; None if the policy has no state. The number of slots grows."""
        if not self._states:
            return None
        if not self._slots:
            size = len(next(iter(self._kept.values())))
            self._slots = list(range(2 * size + 8, size - 1, -1))
            for state in self._states:
                more = state.spec.zeros(size + 9)
                self._kept[state.spec.name] = np.concatenate([self._kept[state.spec.name], more])
        slot = self._slots.pop()
        for state in self._states:
            self._kept[state.spec.name][slot] = state.initial_value(1)[0]
        return slot

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
        """The inputs of one request with memory of its own. `observations` are its bytes, (n,) uint8."""
        return self._complete(observations.view(self._items.dtype).reshape(-1, *self._items.shape[1:]), [item])

    def _complete(self, observations: Array, batch: Sequence[Seated]) -> Arrays:
        size = len(observations)
        self._extend_defaults(size)
        inputs = {name: array[:size] for name, array in self._defaults.items()}
        inputs[self._name] = self._spec.from_wire(observations)
        if self._states:
            slots = [item.slot for item in batch if item.slot is not None]
            inputs |= {name: array[slots] for name, array in self._kept.items()}
            inputs[IS_INIT.name] = np.array([item.begins for item in batch])
        return inputs

    def _extend_defaults(self, size: int) -> None:
        """Have the other inputs' defaults for `size` items: a request can have more items than there are rows."""
        if size > self._defaults_size:
            self._defaults_size = size
            filled = complete(self._signature, {self._name: self._spec.zeros(1)}, size).inputs
            self._defaults = {name: array for name, array in filled.items() if name != self._name}

    def scatter(self, batch: Sequence[Seated], results: Arrays) -> None:
        """Store the new state of each request that has a slot. `results`: each (B, *shape)."""
        if not self._states:
            return
        slots, places, start = [], [], 0
        for item in batch:
            if item.slot is not None:
                slots.append(item.slot)
                places.append(start)
            start += item.size
        # Everything that can fail comes first: the state of an episode moves as a whole, or not at all.
        to, new = np.array(slots, np.intp), [results[state.output][places] for state in self._states]
        for state, values in zip(self._states, new, strict=True):
            self._kept[state.spec.name][to] = values
