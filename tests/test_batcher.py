from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Mapping

import numpy as np
import pytest

from actserve.core.errors import NotServing, Overloaded, RuntimeFailure, TooLate, WaitTooLong
from actserve.core.signature import Array, Arrays
from actserve.engine.batch import ArrayRequest, BatchRequest, form
from actserve.engine.batcher import Batcher
from tests.waiting import until_in_loop


class Doubler:
    """A runtime that doubles x, remembers its batch sizes, can be held up, and chokes on negative numbers."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()

    def run(self, batch: Mapping[str, Array]) -> Arrays:
        self.entered.set()
        assert self.free.wait(5)
        x = batch["x"]
        self.sizes.append(len(x))
        if (x < 0).any():
            raise RuntimeFailure("negative")
        return {"y": x * 2}

    def hold(self) -> None:
        self.free.clear()
        self.entered.clear()


def items(*values: float) -> Arrays:
    return {"x": np.array(values)}


def waiting(*sizes: int) -> deque[BatchRequest]:
    async def make() -> deque[BatchRequest]:
        return deque(ArrayRequest(items(*range(size)), size) for size in sizes)

    return asyncio.run(make())


@pytest.mark.parametrize(
    ("sizes", "room", "taken"), [([], 8, 0), ([1, 1, 1], 8, 3), ([1, 1, 1], 2, 2), ([8], 8, 1), ([5, 4, 1], 8, 1)]
)
def test_form_takes_what_fits_in_order(sizes: list[int], room: int, taken: int) -> None:
    queue = waiting(*sizes)
    before = list(queue)
    assert form(queue, room, 0) == (before[:taken], [])
    assert list(queue) == before[taken:]


def test_form_drops_the_cancelled() -> None:
    queue = waiting(4, 4, 4)
    first, second, third = queue
    for request in (first, third):
        assert isinstance(request, ArrayRequest)
        request.future.cancel()
    assert form(queue, 5, 0) == ([second], [first, third])
    assert not queue


def test_form_drops_what_has_waited_for_too_long() -> None:
    queue = waiting(4, 4, 4)
    first, second, third = queue
    first.since_ns, second.since_ns, third.since_ns = 0, 1000, 0
    first.patience_ns = second.patience_ns = 500
    assert form(queue, 8, 501) == ([second, third], [first])


def test_who_would_wait_for_too_long_is_refused_at_once() -> None:
    async def scenario() -> None:
        runtime = Doubler()
        batcher = Batcher(runtime.run, 8, 100)
        batcher.start()
        await batcher.submit(items(1.0), 1)  # there is a pace now
        runtime.hold()
        running = batcher.submit(items(1.0), 1)
        await until_in_loop(runtime.entered.is_set)
        queued = batcher.submit(items(1.0), 1, patience_ns=10**12)
        with pytest.raises(TooLate):
            batcher.submit(items(1.0), 1, patience_ns=1)
        late = batcher.submit(items(1.0), 1, patience_ns=50_000_000)
        await asyncio.sleep(0.06)
        runtime.free.set()
        with pytest.raises(TooLate, match="50,000"):
            await late
        await asyncio.gather(running, queued)
        assert runtime.sizes == [1, 1, 1]
        await batcher.close()

    asyncio.run(scenario())


def test_a_crowd_is_answered_in_one_call_each_with_its_own_rows() -> None:
    async def scenario() -> None:
        runtime = Doubler()
        batcher = Batcher(runtime.run, max_items=8, max_waiting=100)
        batcher.start()
        runtime.hold()
        first = batcher.submit(items(1.0), 1)
        await until_in_loop(runtime.entered.is_set)
        crowd = [batcher.submit(items(*range(n, n + size)), size) for n, size in ((10, 1), (20, 3), (30, 2), (40, 4))]
        runtime.free.set()
        assert (await first).outputs["y"].tolist() == [2]
        assert [(await one).outputs["y"].tolist() for one in crowd] == [[20], [40, 42, 44], [60, 62], [80, 82, 84, 86]]
        assert runtime.sizes == [1, 6, 4]
        ran, *waited = await asyncio.gather(first, *crowd)
        assert all(answer.queue_ns > 0 for answer in waited)
        assert batcher.statistics().items == 11
        assert batcher.statistics().run_ns >= ran.run_ns + waited[0].run_ns
        assert batcher.statistics().waiting == 0
        await batcher.close()

    asyncio.run(scenario())


def test_cancelling_one_leaves_the_others() -> None:
    async def scenario() -> None:
        runtime = Doubler()
        batcher = Batcher(runtime.run, max_items=8, max_waiting=100)
        batcher.start()
        runtime.hold()
        running = batcher.submit(items(1.0), 1)
        await until_in_loop(runtime.entered.is_set)
        queued = [batcher.submit(items(float(n)), 1) for n in range(4)]
        queued[1].cancel()
        running.cancel()  # in the runtime already
        runtime.free.set()
        assert [(await queued[n]).outputs["y"].item() for n in (0, 2, 3)] == [0, 4, 6]
        assert runtime.sizes == [1, 3]
        await batcher.close()

    asyncio.run(scenario())


def test_one_bad_request_does_not_fail_its_batch() -> None:
    async def scenario() -> None:
        runtime = Doubler()
        batcher = Batcher(runtime.run, max_items=8, max_waiting=100)
        batcher.start()
        runtime.hold()
        batcher.submit(items(0.0), 1)
        await until_in_loop(runtime.entered.is_set)
        good, bad, good_too = (batcher.submit(items(x), 1) for x in (1.0, -1.0, 3.0))
        runtime.free.set()
        assert (await good).outputs["y"].item() == 2
        with pytest.raises(RuntimeFailure, match="negative"):
            await bad
        assert (await good_too).outputs["y"].item() == 6
        await batcher.close()

    asyncio.run(scenario())


def test_a_foreign_exception_reaches_the_waiter_and_the_thread_lives() -> None:
    def run(batch: Mapping[str, Array]) -> Arrays:
        return {"y": 1 / batch["x" if batch["x"][0] else "nothing"]}

    async def scenario() -> None:
        batcher = Batcher(run, max_items=8, max_waiting=100)
        batcher.start()
        with pytest.raises(RuntimeFailure, match="KeyError"):
            await batcher.submit(items(0.0), 1)
        assert (await batcher.submit(items(2.0), 1)).outputs["y"].item() == 0.5
        await batcher.close()

    asyncio.run(scenario())


def test_the_queue_is_bounded_and_recovers() -> None:
    async def scenario() -> None:
        runtime = Doubler()
        batcher = Batcher(runtime.run, max_items=2, max_waiting=3)
        batcher.start()
        runtime.hold()
        taken = [batcher.submit(items(1.0), 1), batcher.submit(items(1.0, 2.0), 2)]
        with pytest.raises(Overloaded, match="3 items are waiting"):
            batcher.submit(items(1.0), 1)
        runtime.free.set()
        await asyncio.gather(*taken)
        await batcher.submit(items(1.0, 2.0), 2)
        await batcher.close()

    asyncio.run(scenario())


def test_close_answers_what_was_submitted_and_refuses_the_rest() -> None:
    async def scenario() -> None:
        runtime = Doubler()
        batcher = Batcher(runtime.run, max_items=1, max_waiting=100)
        with pytest.raises(NotServing):
            batcher.submit(items(1.0), 1)
        batcher.start()
        runtime.hold()
        accepted = [batcher.submit(items(float(n)), 1) for n in range(5)]
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(NotServing, match="closing"):
            batcher.submit(items(1.0), 1)
        runtime.free.set()
        await closing
        assert [(await one).outputs["y"].item() for one in accepted] == [0, 2, 4, 6, 8]

    asyncio.run(scenario())


@pytest.mark.parametrize("working", [True, False])
def test_a_turn_that_works_for_too_long_refuses_the_rest_of_it(working: bool) -> None:
    async def scenario() -> None:
        batcher = Batcher(Doubler().run, 8, 100, max_wait_ns=20_000_000, quick=True)
        batcher.start()
        first = batcher.submit(items(1.0), 1)
        if working:
            until_ns = time.thread_time_ns() + 25_000_000
            while time.thread_time_ns() < until_ns:
                pass
            with pytest.raises(WaitTooLong):
                batcher.submit(items(2.0), 1)
        else:
            time.sleep(0.025)  # as if the host gave the CPU to another
            batcher.submit(items(2.0), 1)
        await first
        await batcher.submit(items(3.0), 1)  # in another turn
        await batcher.close()

    asyncio.run(scenario())
