"""Plan: which action to take at which time, from chunks of actions that may come late and overlap."""

from __future__ import annotations

import numpy as np

from actserve.core.signature import Array, Chunk


class Plan:
    """The actions of one episode. Ticks count its control periods; a chunk begins at the tick of its observation.

    The newest chunk counts, or with `Chunk.ensemble` the mean of all chunks that plan for a tick.
    """

    def __init__(self, chunk: Chunk, horizon: int) -> None:
        self.chunk, self.horizon = chunk, horizon
        self._chunks: list[tuple[int, Array]] = []  # (first tick, (horizon, *shape)), the oldest first

    def add(self, tick: int, actions: Array) -> None:
        """A chunk for the observation of `tick`: (horizon, *shape)."""
        newest = [(tick, actions)]
        self._chunks = newest if self.chunk.ensemble is None else [*self._chunks, *newest]

    def action(self, tick: int) -> Array | None:
        """The action for `tick`, (*shape); None if no chunk reaches so far. Earlier ticks are forgotten."""
        self._chunks = [(first, actions) for first, actions in self._chunks if tick < first + len(actions)]
        planned: list[Array] = [actions[tick - first] for first, actions in self._chunks]
        if not planned:
            return None
        if len(planned) == 1 or self.chunk.ensemble is None:
            return planned[-1]
        weights = np.exp(-self.chunk.ensemble * np.arange(len(planned)))
        mean: Array = np.average(planned, 0, weights)
        return mean.astype(planned[0].dtype)

    def left(self, tick: int) -> int:
        """The number of actions that are planned from `tick` on."""
        return max((first + len(actions) - tick for first, actions in self._chunks), default=0)

    def taken(self, tick: int) -> int:
        """The number of actions that were taken of the newest chunk before `tick`; `horizon` without one."""
        return tick - self._chunks[-1][0] if self._chunks else self.horizon

    def left_over(self, tick: int, zeros: Array) -> Array:
        """What is left of the newest chunk from `tick` on, then zeros: as `zeros`, (horizon, *shape)."""
        found = zeros.copy()
        if self._chunks:
            first, actions = self._chunks[-1]
            rest = actions[max(0, tick - first) :]
            found[: len(rest)] = rest
        return found
