from __future__ import annotations

import numpy as np
import pytest

from actserve.core.plan import Plan
from actserve.core.signature import Array, Chunk

HORIZON = 5


def chunk(tick: int) -> Array:
    """Says which chunk planned an action, and for which tick."""
    return np.array([[tick, tick + i] for i in range(HORIZON)], np.float32)


def plan(ensemble: float | None = None) -> Plan:
    return Plan(Chunk("actions", 3, ensemble=ensemble), HORIZON)


def test_the_newest_chunk_counts_from_the_present_tick_on() -> None:
    actions = plan()
    assert actions.action(0) is None
    assert (actions.left(0), actions.taken(0)) == (0, HORIZON)
    actions.add(0, chunk(0))
    found = [actions.action(tick) for tick in range(3)]
    assert [action is not None and action.tolist() for action in found] == [[0, 0], [0, 1], [0, 2]]
    actions.add(1, chunk(1))  # came two ticks after its observation
    found = [actions.action(tick) for tick in range(3, 7)]
    assert [None if action is None else action.tolist() for action in found] == [[1, 3], [1, 4], [1, 5], None]
    assert actions.left(4) == 0, "what is over is forgotten"


def test_the_rest_is_counted_and_given_to_the_next_inference() -> None:
    actions = plan()
    zeros = np.zeros((HORIZON, 2), np.float32)
    assert actions.left_over(0, zeros).tolist() == zeros.tolist()
    actions.add(4, chunk(4))
    assert (actions.left(6), actions.taken(6)) == (3, 2)
    assert actions.left_over(6, zeros).tolist() == [[4, 6], [4, 7], [4, 8], [0, 0], [0, 0]]


def test_an_ensemble_is_the_weighted_mean_with_the_oldest_chunk_first() -> None:
    actions = plan(ensemble=0.5)
    for tick in range(3):
        actions.add(tick, chunk(tick))
    found = actions.action(3)
    assert found is not None
    assert found.dtype == np.float32
    weights = np.exp(-0.5 * np.arange(3))
    assert found.tolist() == pytest.approx([np.average([0, 1, 2], weights=weights), 3])
    last = actions.action(6)
    assert last is not None
    assert last.tolist() == [2, 6], "the older two do not reach so far"
