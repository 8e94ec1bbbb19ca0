"""Batcher: turns concurrent requests into runtime calls.

A batch is everything that is queued when the runtime becomes free. So a single request never waits for others, many
requests take few calls, and there is no timer. The queue belongs to the event loop. A slow program runs in a thread. A
quick program runs in the event loop itself, because a thread switch costs more than the call: it runs when a batch is
full, or when the loop has read every socket.

With a quick program, requests wait in the sockets' buffers. Their waiting time is the time since the loop last read
every socket: one turn. Once a turn has used `max_wait_ns` of CPU time, the rest of the turn refuses new requests. Time
in which the process did not run (a container over its CPU quota) is not counted as load.

An exception, wherever it is raised, is the answer to the requests of its batch, and the next batch runs. If the
bookkeeping itself fails, or the program does not return, the batcher has `failed`: it answers every request with the
reason, and takes no more. The worker must then be replaced.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass
from time import perf_counter_ns, thread_time_ns

import numpy as np

from actserve.core.errors import ActserveError, NotServing, Overloaded, RuntimeFailure, TooLate, WaitTooLong
from actserve.core.limits import LIMITED
from actserve.core.signature import Array, Arrays
from actserve.engine.arena import Arena
from actserve.engine.batch import Answer, ArrayRequest, BatchRequest, BatchResult, form
from actserve.engine.recorders import StepRecorder
from actserve.telemetry.meters import Meters

log = logging.getLogger("actserve")

FOR_EVER = 1 << 62  # nanoseconds
CLOSING = "this policy is closing; try again shortly"

Run = Callable[[Mapping[str, Array]], Arrays]


@dataclass(frozen=True)
class BatcherStatistics:
    waiting: int  # items submitted and not yet answered
    batches: int  # runtime calls so far
    items: int  # items in those calls
    run_ns: int  # the time in those calls


class Batcher:
    """Batches requests for one runtime. `start` it in the event loop that submits; `close` answers the rest.

    A `quick` program's calls are short enough to run in the event loop. A `limited` one says which items its limits
    changed, and the batcher counts them. `failed` says why the batcher cannot go on.
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
        limited: bool = False,
    ) -> None:
        self.arena = arena
        self.meters = Meters()
        self.failed: str | None = None
        self._run = run
        self._max_items = max_items
        self._max_waiting = max_waiting
        self._max_wait_ns = max_wait_ns
        self._quick = quick
        self._limited = limited
        self._queue: deque[BatchRequest] = deque()
        self._alone: deque[BatchRequest] = deque()  # each runs alone: its batch failed
        self._batch: list[BatchRequest] = []  # in the program
        self._open = False
        self._thread: ThreadPoolExecutor | None = None
        self._queued = 0  # items in the queue
        self._scheduled = False  # the next batch runs when the loop has read every socket
        self._running = False
        self._turn_ns = 0  # when the turn's first request came; 0: none has
        self._worked_ns = 0  # of the loop's thread until then
        self._turn_is_full = False  # its later requests would wait for too long
        self._context = Context()  # what is run is nobody's alone
        self._drained = asyncio.Event()
        self._waiting = 0
        self._batches = 0
        self._items = 0
        self._run_ns = 0
        self._watched = -1  # the number of batches at the last `check_program`
        self._watched_ns = 0  # for so long it has not changed

    def start(self) -> None:
        """Raises `RuntimeFailure` if the system has no thread left for the program."""
        self._loop = asyncio.get_running_loop()
        if not self._quick:
            self._thread = ThreadPoolExecutor(1, "batcher")
            try:
                self._thread.submit(int)  # starts the thread now: there may be none left later
            except RuntimeError as error:
                raise RuntimeFailure(f"no thread for the program can be started: {error}") from error
        self._open = True

    async def close(self) -> None:
        """Refuse new requests, and answer the queued ones."""
        self._open = False
        while self._waiting and self.failed is None:
            self._drained.clear()
            await self._drained.wait()
        if self._thread is not None:
            self._thread.shutdown(wait=self.failed is None)

    def submit(
        self, inputs: Arrays, size: int, patience_ns: int = 0, recorder: StepRecorder | None = None
    ) -> asyncio.Future[Answer]:
        """Queue `size` items (at most `max_items`); raises as `admit`."""
        self.admit(size, patience_ns)
        request = ArrayRequest(inputs, size, patience_ns, recorder)
        self.enter(request)
        return request.future

    def enter(self, request: BatchRequest) -> None:
        """Queue a request that was admitted. Raises `NotServing` when the batcher is not running."""
        if not self._open:
            raise NotServing(self.failed or CLOSING)
        request.entered_ns = perf_counter_ns()
        self._queue.append(request)
        self._waiting += request.size
        self._queued += request.size
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
            raise NotServing(self.failed or CLOSING)
        expected = 0 if self.arena is None else len(self.arena.waiting)
        if self._waiting + expected + size > self._max_waiting:
            raise Overloaded(self._max_waiting)
        now_ns = perf_counter_ns()
        if not self._turn_ns:
            self._turn_ns = now_ns
            self._worked_ns = thread_time_ns()
            self._loop.call_soon(self._end_turn)
        waited_ns = now_ns - self._turn_ns
        if self._quick and waited_ns > self._max_wait_ns and not self._turn_is_full:
            self._turn_is_full = thread_time_ns() - self._worked_ns > self._max_wait_ns
        if self._turn_is_full:
            raise WaitTooLong(self._max_wait_ns / 1e6)
        if patience_ns and waited_ns + self._waiting * self._run_ns // max(1, self._items) > patience_ns:
            raise TooLate(patience_ns // 1000)

    def _end_turn(self) -> None:
        self._turn_ns = 0
        self._turn_is_full = False

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
        try:
            self._running = True
            if self._alone:
                batch = [self._alone.popleft()]
            else:
                batch, dropped = form(self._queue, self._max_items, perf_counter_ns())
                self._queued -= sum(request.size for request in (*batch, *dropped))
                for request in dropped:
                    self._settle([request], BatchResult({}, TooLate(request.patience_ns // 1000), 0, 0))
            self._batch = batch
            if batch:
                self._start_batch(batch)
            else:
                self._go_on()
        except Exception as error:
            self._fail(error)

    def _start_batch(self, batch: list[BatchRequest]) -> None:
        self._batches += 1
        self._items += sum(request.size for request in batch)
        try:
            inputs = self._gather(batch)
        except Exception as error:
            failure = _failure("the inputs of a batch could not be collected", error)
            self._deliver(batch, {}, BatchResult({}, failure, 0, 0))
            return
        if self._thread is None:
            self._deliver(batch, inputs, self._call(inputs))
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
        self._loop.call_soon_threadsafe(self._deliver, batch, inputs, outcome)

    def _call(self, inputs: Arrays) -> BatchResult:
        begun_ns = perf_counter_ns()
        try:
            outputs = self._run(inputs)
        except ActserveError as error:
            return BatchResult({}, error, begun_ns, 0)
        except BaseException as error:  # a runtime can raise anything, and the panics of Rust are no `Exception`
            return BatchResult({}, _failure("inference failed", error), begun_ns, 0)
        return BatchResult(outputs, None, begun_ns, perf_counter_ns() - begun_ns)

    def _deliver(self, batch: list[BatchRequest], inputs: Arrays, outcome: BatchResult) -> None:
        if self.failed is not None:  # answered already
            return
        try:
            self._run_ns += outcome.run_ns
            if outcome.error is not None and len(batch) > 1:
                self._alone.extend(batch)  # each alone: one bad request must not fail the others
                self._batch = []
            else:
                result = self._stored(batch, outcome)
                self._batch = []
                if result.error is None:
                    _capture(batch, inputs, result)
                self._settle(batch, result)  # the clients do not wait for what follows
                if result.error is None:
                    self._count(batch, outcome)
            self._go_on()
        except Exception as error:
            self._fail(error)

    def _stored(self, batch: list[BatchRequest], outcome: BatchResult) -> BatchResult:
        """Store the state of the episodes of a successful batch; the error if that fails."""
        if outcome.error is not None:
            return outcome
        try:
            if self.arena is not None:
                self.arena.scatter(batch, outcome.outputs)
        except Exception as error:
            return BatchResult({}, _failure("the results of a batch could not be stored", error), outcome.begun_ns, 0)
        return outcome

    def _count(self, batch: list[BatchRequest], outcome: BatchResult) -> None:
        try:
            self.meters.add_batch(batch, outcome.begun_ns, outcome.run_ns)
            if self._limited:
                self.meters.add_limited(outcome.outputs[LIMITED])
        except Exception:  # the batch is answered, and the next one runs
            log.exception("a batch could not be counted")

    def _settle(self, batch: list[BatchRequest], outcome: BatchResult) -> None:
        start = 0
        for request in batch:
            self._waiting -= request.size
            try:
                request.settle(outcome, start)
            except Exception as error:
                self._settle_failed(request, outcome, error)
            start += request.size

    @staticmethod
    def _settle_failed(request: BatchRequest, outcome: BatchResult, error: Exception) -> None:
        """Answer with an error. If the state of the episode has moved, an error would be wrong: the episode ends."""
        log.error("an answer could not be given", exc_info=error)
        try:
            if request.slot is None or outcome.error is not None:
                failure = _failure("the answer could not be given", error)
                request.settle(BatchResult({}, failure, outcome.begun_ns, 0), 0)
                return
        except Exception:
            log.exception("nor could an error; the connection is closed")
        request.abandon()

    def check_program(self, limit_ns: int, elapsed_ns: int) -> None:
        """To be called regularly, `elapsed_ns` of running time after the last call.

        The batcher fails if one call of the program has not returned for `limit_ns`.
        """
        if self._thread is None or not self._running or self._batches != self._watched:
            self._watched, self._watched_ns = self._batches, 0
            return
        self._watched_ns += elapsed_ns
        if self._watched_ns > limit_ns and self.failed is None:
            self._fail(TimeoutError(f"a call of the program has not returned for {limit_ns / 1e9:.0f} s"))

    def _fail(self, error: Exception) -> None:
        """Answer every request with an error, and take no more."""
        log.error("a policy can no longer be served by this worker: %s", error, exc_info=error)
        self.failed = f"the worker has failed and is being replaced ({type(error).__name__}); try again shortly"
        self._open = False
        lost = {id(request): request for request in (*self._batch, *self._alone, *self._queue)}
        self._batch, self._queued, self._waiting = [], 0, 0
        self._alone.clear()
        self._queue.clear()
        for request in lost.values():
            try:
                request.settle(BatchResult({}, NotServing(self.failed), 0, 0), 0)
            except Exception:  # among others, those that were answered before the failure
                request.abandon()
        self._drained.set()

    def _go_on(self) -> None:
        self._running = False
        if self._queue or self._alone:
            if not self._scheduled:
                self._schedule()
        elif not self._waiting:
            self._drained.set()


def _capture(batch: list[BatchRequest], inputs: Arrays, outcome: BatchResult) -> None:
    """Give the recorders of recorded requests their items."""
    start = 0
    for request in batch:
        if request.recorder is not None:
            try:
                request.recorder.capture(inputs, outcome.outputs, slice(start, start + request.size), outcome.run_ns)
            except Exception:  # the client is answered all the same
                log.exception("a step could not be recorded")
        start += request.size


def _failure(what: str, cause: BaseException) -> RuntimeFailure:
    failure = RuntimeFailure(f"{what}: {type(cause).__name__}")
    failure.__cause__ = cause
    return failure
