"""Batcher: turns concurrent requests into runtime calls.

A batch is everything that is queued when the runtime becomes free. So a single request never waits for others, many
requests take few calls, and there is no timer. The queue belongs to the event loop. A slow program runs in a thread. A
quick program runs in the event loop itself, because a thread switch costs more than the call: it runs when a batch is
full, or when the loop has read every socket.

With a quick program, requests wait in the sockets' buffers. Their waiting time is the time since the loop last read
every socket: one turn. Once a turn has used `max_wait_ns` of CPU time, the rest of the turn refuses new requests. Time
in which the process did not run (a container over its CPU quota) is not counted as load.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass
from time import perf_counter_ns, thread_time_ns

import numpy as np

from actserve.core.errors import ActserveError, NotServing, Overloaded, RuntimeFailure, TooLate, WaitTooLong
from actserve.core.signature import Array, Arrays
from actserve.engine.arena import Arena
from actserve.telemetry.meters import Meters

FOR_EVER = 1 << 62  # nanoseconds
CLOSING = "this policy is closing; try again shortly"

Run = Callable[[Mapping[str, Array]], Arrays]


@dataclass(frozen=True, eq=False)
class Answer:
    """Every output, each (size, *shape), and how long the request was queued and run."""

    outputs: Arrays
    queue_ns: int  # until its batch was formed
    run_ns: int  # of the runtime call of the whole batch


@dataclass(frozen=True)
class BatcherStatistics:
    waiting: int  # items submitted and not yet answered
    batches: int  # runtime calls so far
    items: int  # items in those calls
    run_ns: int  # the time in those calls


@dataclass(frozen=True, eq=False, slots=True)
class BatchResult:
    """The result of one runtime call: outputs, each (B, *shape), or an error."""

    outputs: Arrays
    error: ActserveError | None
    begun_ns: int
    run_ns: int


class BatchRequest(ABC):
    """The items of one request, queued or running."""

    size: int
    row: int | None = None  # of the batcher's arena, with its only item; None: it has arrays of its own
    slot: int | None = None  # of the arena, with the state of its episode
    begins = False  # the first step of its episode
    since_ns = 0  # when its head came
    entered_ns = 0  # when it was queued
    patience_ns = 0  # how long it may wait before it runs; 0: for ever

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """Whether its client has disconnected. It is settled all the same."""

    @abstractmethod
    def inputs(self) -> Arrays:
        """Each (size, *shape)."""

    @abstractmethod
    def settle(self, outcome: BatchResult, start: int) -> None:
        """Called once, in the event loop, with the batch's result; this request's items begin at `start`."""


def form(waiting: deque[BatchRequest], max_items: int, now_ns: int) -> tuple[list[BatchRequest], list[BatchRequest]]:
    """Take the next batch off the front of `waiting`; returns (batch, dropped).

    The batch has as many whole requests as fit, in order. A request larger than `max_items` is a batch of its own.
    Requests that were cancelled, or that have waited for longer than they may, are dropped.
    """
    batch: list[BatchRequest] = []
    dropped: list[BatchRequest] = []
    room = max_items
    while waiting:
        request = waiting[0]
        if request.cancelled or (request.patience_ns and now_ns - request.since_ns > request.patience_ns):
            dropped.append(waiting.popleft())
        elif batch and request.size > room:
            break
        else:
            batch.append(waiting.popleft())
            room -= request.size
    return batch, dropped


class Batcher:
    """Batches requests for one runtime. `start` it in the event loop that submits; `close` answers the rest.

    A `quick` program's calls are short enough to run in the event loop.
    """

    def __init__(
        self,
        run: Run,
        max_items: int,
        max_waiting: int,
        *,
        max_wait_ns: int = FOR_EVER,
        quick: bool = False,
        arena: Arena | None = None,
    ) -> None:
        self.arena = arena
        self.meters = Meters()
        self._run = run
        self._max_items = max_items
        self._max_waiting = max_waiting
        self._max_wait_ns = max_wait_ns
        self._quick = quick
        self._queue: deque[BatchRequest] = deque()
        self._alone: deque[BatchRequest] = deque()  # each runs alone: its batch failed
        self._open = False
        self._thread: ThreadPoolExecutor | None = None
        self._queued = 0  # items in the queue
        self._scheduled = False  # the next batch runs when the loop has read every socket
        self._running = False
        self._turn_ns = 0  # when the turn's first request came; 0: none has
        self._worked_ns = 0  # of the loop's thread until then
        self._context = Context()  # what is run is nobody's alone
        self._drained = asyncio.Event()
        self._waiting = 0
        self._batches = 0
        self._items = 0
        self._run_ns = 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open = True
        if not self._quick:
            self._thread = ThreadPoolExecutor(1, "batcher")

    async def close(self) -> None:
        """Refuse new requests, and answer the queued ones."""
        self._open = False
        while self._waiting:
            self._drained.clear()
            await self._drained.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def submit(self, inputs: Arrays, size: int, patience_ns: int = 0) -> asyncio.Future[Answer]:
        """Queue `size` items (at most `max_items`); raises as `admit`."""
        self.admit(size, patience_ns)
        request = ArrayRequest(inputs, size, patience_ns)
        self.enter(request)
        return request.future

    def enter(self, request: BatchRequest) -> None:
        """Queue a request that was admitted. Raises `NotServing` when the batcher is not running."""
        if not self._open:
            raise NotServing(CLOSING)
        request.entered_ns = perf_counter_ns()
        self._waiting += request.size
        self._queued += request.size
        self._queue.append(request)
        if self._running:
            return
        # A single request never runs at once: it would be answered while its socket is being read, and reading goes on
        # while there is more to read, so one client could starve all others.
        if self._quick and self._queued >= self._max_items and len(self._queue) > 1:
            self._context.run(self._next)
        elif not self._scheduled:
            self._schedule()

    def admit(self, size: int, patience_ns: int = 0) -> None:
        """Check whether `size` more items may be queued. Requests that wait for a row of the arena count as queued.

        Raises `NotServing`; `Overloaded` if the queue is full or the wait too long; `TooLate` if the wait would be
        longer than `patience_ns`, where 0 is for ever.
        """
        if not self._open:
            raise NotServing(CLOSING)
        expected = 0 if self.arena is None else len(self.arena.waiting)
        if self._waiting + expected + size > self._max_waiting:
            raise Overloaded(self._max_waiting)
        now_ns = perf_counter_ns()
        if not self._turn_ns:
            self._turn_ns = now_ns
            self._worked_ns = thread_time_ns()
            self._loop.call_soon(self._end_turn)
        waited_ns = now_ns - self._turn_ns
        if self._quick and waited_ns > self._max_wait_ns and thread_time_ns() - self._worked_ns > self._max_wait_ns:
            raise WaitTooLong(self._max_wait_ns / 1e6)
        if patience_ns and waited_ns + self._waiting * self._run_ns // max(1, self._items) > patience_ns:
            raise TooLate(patience_ns // 1000)

    def _end_turn(self) -> None:
        self._turn_ns = 0

    def statistics(self) -> BatcherStatistics:
        return BatcherStatistics(self._waiting, self._batches, self._items, self._run_ns)

    def _schedule(self) -> None:
        self._scheduled = True
        self._loop.call_soon(self._scheduled_next, context=self._context)

    def _scheduled_next(self) -> None:
        self._scheduled = False
        if not self._running:
            self._next()

    def _next(self) -> None:
        """Form the next batch and run it."""
        self._running = True
        if self._alone:
            batch = [self._alone.popleft()]
        else:
            batch, dropped = form(self._queue, self._max_items, perf_counter_ns())
            self._queued -= sum(request.size for request in (*batch, *dropped))
            for request in dropped:
                self._settle([request], BatchResult({}, TooLate(request.patience_ns // 1000), 0, 0))
        if not batch:
            self._go_on()
            return
        self._batches += 1
        self._items += sum(request.size for request in batch)
        inputs = self._gather(batch)
        if self._thread is None:
            self._deliver(batch, self._call(inputs))
        else:
            self._thread.submit(self._call_and_tell, batch, inputs)

    def _gather(self, batch: list[BatchRequest]) -> Arrays:
        """Every input, each (B, *shape)."""
        if self.arena is not None and all(request.row is not None for request in batch):
            return self.arena.inputs(batch)
        if len(batch) == 1:
            return batch[0].inputs()
        parts = [request.inputs() for request in batch]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _call_and_tell(self, batch: list[BatchRequest], inputs: Arrays) -> None:
        """In the thread."""
        outcome = self._call(inputs)
        self._loop.call_soon_threadsafe(self._deliver, batch, outcome)

    def _call(self, inputs: Arrays) -> BatchResult:
        begun_ns = perf_counter_ns()
        try:
            outputs = self._run(inputs)
        except ActserveError as error:
            return BatchResult({}, error, begun_ns, 0)
        except Exception as error:  # a runtime can raise anything; every request of the batch gets an answer
            failure = RuntimeFailure(f"inference failed: {type(error).__name__}")
            failure.__cause__ = error
            return BatchResult({}, failure, begun_ns, 0)
        return BatchResult(outputs, None, begun_ns, perf_counter_ns() - begun_ns)

    def _deliver(self, batch: list[BatchRequest], outcome: BatchResult) -> None:
        self._run_ns += outcome.run_ns
        if outcome.error is not None and len(batch) > 1:
            self._alone.extend(batch)  # each alone: one bad request must not fail the others
        else:
            if outcome.error is None:
                self.meters.add_batch(batch, outcome.begun_ns, outcome.run_ns)
                if self.arena is not None:
                    self.arena.scatter(batch, outcome.outputs)
            self._settle(batch, outcome)
        self._go_on()

    def _settle(self, batch: list[BatchRequest], outcome: BatchResult) -> None:
        start = 0
        for request in batch:
            self._waiting -= request.size
            request.settle(outcome, start)
            start += request.size

    def _go_on(self) -> None:
        self._running = False
        if self._queue or self._alone:
            if not self._scheduled:
                self._schedule()
        elif not self._waiting:
            self._drained.set()


class ArrayRequest(BatchRequest):
    """A request with arrays of its own, and a future for its `Answer`."""

    def __init__(self, inputs: Arrays, size: int, patience_ns: int = 0) -> None:
        self.future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.size = size
        self._inputs = inputs
        self.since_ns = perf_counter_ns()
        self.patience_ns = patience_ns

    @property
    def cancelled(self) -> bool:
        return self.future.cancelled()

    def inputs(self) -> Arrays:
        return self._inputs

    def settle(self, outcome: BatchResult, start: int) -> None:
        if self.future.done():  # cancelled while it ran
            return
        if outcome.error is not None:
            self.future.set_exception(outcome.error)
            return
        stop = start + self.size
        outputs = {name: array[start:stop] for name, array in outcome.outputs.items()}
        self.future.set_result(Answer(outputs, outcome.begun_ns - self.since_ns, outcome.run_ns))
