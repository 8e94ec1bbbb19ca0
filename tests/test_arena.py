from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import pytest

from actserve.core.signature import Noise, Signature, State, TensorSpec
from actserve.engine.arena import MAX_BYTES, SLOW_NS, SPARE_BYTES, Arena
from tests import fake_policy
from tests.fastpath_service import SIGNATURE


@dataclass
class Item:
    row: int | None
    slot: int | None = None
    begins: bool = False
    size: int = 1


class Guest:
    def __init__(self, stays: bool = True) -> None:
        self.rows: list[int] = []
        self.stays = stays

    def seat(self, row: int) -> bool:
        if self.stays:
            self.rows.append(row)
        return self.stays


def test_the_lowest_free_row_comes_first() -> None:
    arena = Arena(SIGNATURE, 8)
    rows = [arena.acquire() for _ in range(arena.free)]
    assert rows == list(range(len(rows)))
    assert arena.acquire() is None
    for row in (5, 2, 9):
        arena.release(row)
    assert [arena.acquire() for _ in range(4)] == [2, 5, 9, None]


def test_who_waits_longest_is_seated_first_and_who_has_gone_is_passed_over() -> None:
    arena = Arena(SIGNATURE, 8)
    for _ in range(arena.free):
        arena.acquire()
    first, gone, second = Guest(), Guest(stays=False), Guest()
    arena.waiting.extend([first, gone, second])
    arena.release(3)
    arena.release(1)
    arena.release(7)
    assert (first.rows, second.rows, arena.free) == ([3], [1], 1)


class Slow:
    """Sends slowly into `row`."""

    def __init__(self, arena: Arena) -> None:
        row = arena.acquire()
        assert row is not None
        self.row = row
        arena.coming[self] = perf_counter_ns()

    def unseat(self) -> int:
        return self.row


def test_who_sends_slowly_keeps_nobody_waiting() -> None:
    arena = Arena(SIGNATURE, 8)
    slow = [Slow(arena), Slow(arena)]
    while arena.free:
        arena.acquire()
    assert arena.acquire() is None  # they have just begun
    for sender in slow:
        arena.coming[sender] -= 2 * SLOW_NS
    assert arena.acquire() == slow[0].row
    first, second = Guest(), Guest()
    arena.waiting.extend([first, second])
    arena.release(5)
    assert (first.rows, second.rows) == ([5], [slow[1].row])
    assert not arena.coming


def test_where_all_send_slowly_the_first_gives_way_at_once() -> None:
    arena = Arena(SIGNATURE, 8)
    slow = [Slow(arena) for _ in range(arena.free)]
    assert arena.acquire() == slow[0].row
    assert arena.acquire() is None


@pytest.mark.parametrize("rows", [[0], [3, 4, 5], [5, 3, 4], [0, 2], [7, 6], [1, 2, 4]])
def test_a_batch_is_a_view_of_neighbours_and_else_a_copy(rows: list[int]) -> None:
    arena = Arena(SIGNATURE, 8)
    for row in range(8):
        arena.memory[row][:] = bytes([row]) * 12
    (pixels,) = arena.inputs([Item(row) for row in rows]).values()
    assert pixels.shape == (len(rows), 4, 3)
    assert pixels[:, 0, 0].tolist() == rows
    assert pixels.flags.c_contiguous
    neighbours = rows == list(range(rows[0], rows[0] + len(rows)))
    assert np.shares_memory(pixels, arena._items["pixels"]) == neighbours


def test_what_a_request_leaves_out_is_filled_in() -> None:
    signature = Signature(
        observations=(TensorSpec("x", "float32", (2,)),),
        outputs=(TensorSpec("action", "int64", ()),),
        max_batch=8,
        exploration=("deterministic", "random"),
        noise=(Noise(TensorSpec("noise", "float32", (3,)), "uniform"),),
    )
    assert Arena.suits(signature)
    inputs = Arena(signature, 4).inputs([Item(0), Item(1)])
    assert {name: array.shape for name, array in inputs.items()} == {"x": (2, 2), "explore": (2,), "noise": (2, 3)}
    assert not inputs["explore"].any()


def test_policies_with_chance_have_none() -> None:
    x, action = TensorSpec("x", "float32", (2,)), TensorSpec("action", "int64", ())
    assert Arena.suits(fake_policy.SIGNATURE)
    noise = Noise(TensorSpec("noise", "float32", ()), "normal")
    assert not Arena.suits(Signature((x,), (action,), 8, exploration=("random",), noise=(noise,)))


def test_several_observations_and_state_without_a_reset_flag() -> None:
    x, y = TensorSpec("x", "float32", (2,)), TensorSpec("y", "uint8", ())
    state = State(TensorSpec("h", "float32", (2,)), "next_h", (1.0, 2.0))
    signature = Signature((x, y), (TensorSpec("action", "int64", ()),), 8, state=(state,))
    arena = Arena(signature, 2)
    assert not arena.is_received_into
    batch = []
    for number in (1, 2, 3):
        row = arena.place({"x": np.full((1, 2), number, np.float32), "y": np.array([number], np.uint8)})
        assert row is not None
        batch.append(Item(row, arena.keep()))
    assert batch[1].slot is not None
    arena.set_state(batch[1].slot, {"h": np.array([[8, 9]], np.float32)})
    inputs = arena.inputs(batch)
    assert inputs["x"].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert inputs["y"].tolist() == [1, 2, 3]
    assert inputs["h"].tolist() == [[1, 2], [8, 9], [1, 2]]
    assert set(inputs) == {"x", "y", "h"}
    alone = arena.inputs_of(batch[1], {"x": np.full((1, 2), 7, np.float32), "y": np.array([7], np.uint8)})
    assert (alone["x"].tolist(), alone["y"].tolist(), alone["h"].tolist()) == ([[7, 7]], [7], [[8, 9]])
    while arena.free:
        arena.acquire()
    assert arena.place({"x": np.zeros((1, 2), np.float32), "y": np.zeros(1, np.uint8)}) is None


def test_its_memory_is_bounded() -> None:
    large = Signature((TensorSpec("x", "float32", (1 << 20,)),), (TensorSpec("action", "int64", ()),), 256)
    arena = Arena(large, 32)
    assert arena._items["x"].nbytes <= MAX_BYTES
    for items in (1, 1, *range(1, 9)):
        lent = [arena.lend(items) for _ in range(3)]
        assert {len(block) for block in lent} == {items * arena.item_bytes}
        for block in lent:
            arena.take_back(block)
        assert arena.spare_bytes == sum(len(block) for blocks in arena._spare.values() for block in blocks)
        assert 0 < arena.spare_bytes <= SPARE_BYTES
        again = arena.lend(items)
        assert any(again is block for block in lent)
        arena.take_back(again)


def test_states_are_gathered_and_scattered_by_slot() -> None:
    arena = Arena(fake_policy.SIGNATURE, 4)
    slots = [arena.keep() for _ in range(40)]  # it grows, and keeps its contents
    assert slots == list(range(40))
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 99, (40, 2))
    for slot in range(40):
        arena.set_state(slot, {"digest": digests[slot][None], "odd": np.array([slot % 2 == 1])})
    more = arena.keep()
    assert arena.state(7)["digest"].tolist() == [digests[7].tolist()]
    batch = [Item(0, 30, begins=True), Item(1, 3), Item(2, 17)]
    inputs = arena.inputs(batch)
    assert inputs["digest"].tolist() == digests[[30, 3, 17]].tolist()
    assert inputs["odd"].tolist() == [False, True, True]
    assert inputs["is_init"].tolist() == [True, False, False]
    results = {"next_digest": np.arange(12).reshape(6, 2), "next_odd": np.ones(6, bool)}
    arena.scatter([Item(None, None, size=3), *batch], results)
    assert arena.state(3)["digest"].tolist() == [[8, 9]]
    assert arena.state(30)["odd"].tolist() == [True]
    assert arena.state(2)["digest"].tolist() == [digests[2].tolist()]
    arena.forget(17)
    arena.forget(None)
    assert arena.keep() == 17
    assert more == 40
