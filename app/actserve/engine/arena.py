"""Arena: memory that requests are received into and programs read from.

It has rows, one for the observations of each request that is being received or queued, and slots, one for the state of
each request or episode. It hands out the lowest free row first, so the rows of a batch are mostly adjacent, and the
batch is a view instead of a copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np

from actserve.core.completion import complete
from actserve.core.signature import IS_INIT, Array, Arrays, Signature
from actserve.engine.malloc import allocate, zeros

BATCHES = 4  # there are rows for so many: one in the program, one queued, and two being received
MAX_BYTES = 16 << 20  # of all rows
SPARE_BLOCKS = 8  # kept for the next requests of the same size: a new one costs a page fault for each 4 KB
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
    """Rows for the observations of a policy. If it has a single one, `memory[row]` holds its bytes, and a body is
    received there.

    Parameters and noise have their defaults: a request that sets them does not use the arena.
    """

    def __init__(self, signature: Signature, batch: int) -> None:
        specs = signature.observations
        self.item_bytes = sum(spec.item_bytes for spec in specs)
        self.waiting: deque[Waiter] = deque()
        self.coming: dict[Sender, int] = {}  # when each began, in nanoseconds; the oldest comes first
        rows = max(2, min(BATCHES * max(batch, 8), MAX_BYTES // max(1, self.item_bytes)))
        self._specs = specs
        self._items: Arrays = {spec.name: zeros((rows, *spec.shape), spec.wire_dtype) for spec in specs}
        self.is_received_into = len(specs) == 1 and self.item_bytes > 0  # whether a body can be received into a row
        self.bytes = np.empty((0, 0), np.uint8)  # (rows, item_bytes)
        if self.is_received_into:
            self.bytes = self._items[specs[0].name].reshape(rows, -1).view(np.uint8)
        self.memory = [row.data for row in self.bytes]
        self._rows = rows
        self._signature = signature
        self._defaults: Arrays = {}  # of the other inputs, each (n, *shape)
        self._defaults_size = 0
        self._free = list(range(rows))  # a heap
        self._spare: dict[int, list[Array]] = {}  # blocks for the next request, by their number of items
        self.spare_bytes = 0
        self._states = signature.state
        self._kept: Arrays = {state.spec.name: state.spec.zeros(0) for state in self._states}
        self._extend_defaults(rows)
        self._initial: Arrays = {state.spec.name: state.initial_value(1) for state in self._states}
        self._slots: list[int] = []  # free ones

    @staticmethod
    def suits(signature: Signature) -> bool:
        """Whether a request can consist of observations and state alone: no noise is drawn for it by default."""
        return not signature.draws(signature.exploration[0])

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
            if len(self.coming) == self._rows or perf_counter_ns() - since_ns > SLOW_NS:
                del self.coming[sender]
                return sender.unseat()
        return None

    def place(self, tensors: Arrays) -> int | None:
        """Copy the observations of one item, each (1, *shape), into a free row; None if there is none."""
        if not self._free:
            return None
        row = heappop(self._free)
        for spec in self._specs:
            self._items[spec.name][row : row + 1] = spec.to_wire(tensors[spec.name])
        return row

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

    def keep(self, state: Arrays | None = None) -> int | None:
        """A slot for the state of an episode, which begins with `state`, each (1, *shape), or with the initial state.

        None if the policy has no state. The number of slots grows.
        """
        if not self._states:
            return None
        if not self._slots:
            size = len(next(iter(self._kept.values())))
            self._slots = list(range(2 * size + 8, size - 1, -1))
            for spec in (each.spec for each in self._states):
                self._kept[spec.name] = np.concatenate([self._kept[spec.name], spec.zeros(size + 9)])
        self.set_state(self._slots[-1], state or self._initial)
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
        which: Any = slice(first, first + size) if neighbours else rows
        return self._complete({spec.name: spec.from_wire(self._items[spec.name][which]) for spec in self._specs}, batch)

    def inputs_of(self, item: Seated, observations: Array | Arrays) -> Arrays:
        """The inputs of one request with memory of its own: the bytes of its only observation, (n,) uint8, or its
        observations by name, each (n, *shape)."""
        if not isinstance(observations, dict):
            (spec,) = self._specs
            items = observations.view(spec.wire_dtype).reshape(-1, *spec.shape)
            observations = {spec.name: spec.from_wire(items)}
        return self._complete(observations, [item])

    def _complete(self, observations: Arrays, batch: Sequence[Seated]) -> Arrays:
        size = len(next(iter(observations.values())))
        self._extend_defaults(size)
        inputs = {name: array[:size] for name, array in self._defaults.items()}
        inputs |= observations
        if self._states:
            slots = [item.slot for item in batch if item.slot is not None]
            inputs |= {name: array[slots] for name, array in self._kept.items()}
        if self._signature.is_init:
            inputs[IS_INIT.name] = np.array([item.begins for item in batch for _ in range(item.size)])
        return inputs

    def _extend_defaults(self, size: int) -> None:
        """Have the other inputs' defaults for `size` items: a request can have more items than there are rows."""
        if size > self._defaults_size:
            self._defaults_size = size
            filled = complete(self._signature, {}, size).inputs
            self._defaults = {name: array for name, array in filled.items() if name not in self._kept}

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
