"""Batcher: turns concurrent requests into runtime calls.

A batch is all that waits when the runtime comes free, so a lone request never waits for company and a crowd is
answered in few calls; there is no timer. `form` decides, purely; the loop around it is one thread, because a runtime
takes one call at a time and ONNX Runtime gives the GIL back while it runs.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np

from app.errors import ActserveError, NotServing, Overloaded, RuntimeFailure
from app.signature import Array, Arrays

Run = Callable[[Mapping[str, Array]], Arrays]


@dataclass(frozen=True, eq=False)
class Waiting:
    """One request's items: `inputs` by name, each (size, *shape). The request owns its future."""

    inputs: Arrays
    size: int
    future: asyncio.Future[Answer]
    since_ns: int  # when it was submitted, on `time.perf_counter_ns`'s clock


@dataclass(frozen=True, eq=False)
class Answer:
    """Every output, each (size, *shape), and what the request spent its time on."""

    outputs: Arrays
    queue_ns: int  # until its batch was formed
    run_ns: int  # of the runtime call, which it shared with the others of its batch


@dataclass(frozen=True)
class Statistics:
    waiting: int  # items submitted and not yet answered
    batches: int  # runtime calls so far
    items: int  # items in those calls
    run_ns: int  # the time in those calls


def form(waiting: deque[Waiting], max_items: int) -> tuple[list[Waiting], list[Waiting]]:
    """Take the next batch off the front: as many whole requests as fit, in order. Returns (batch, cancelled)."""
    batch: list[Waiting] = []
    cancelled: list[Waiting] = []
    room = max_items
    while waiting and (waiting[0].future.cancelled() or waiting[0].size <= room):
        request = waiting.popleft()
        if request.future.cancelled():
            cancelled.append(request)
        else:
            batch.append(request)
            room -= request.size
    return batch, cancelled


class Batcher:
    """Batches requests for one runtime. `start` it in the event loop that submits; `close` answers the rest."""

    def __init__(self, run: Run, max_items: int, max_waiting: int) -> None:
        self._run = run
        self._max_items = max_items
        self._max_waiting = max_waiting
        self._inbox: SimpleQueue[Waiting | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = 0
        self._batches = 0
        self._items = 0
        self._run_ns = 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Refuse what is new, answer what was submitted, end the thread."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        self._inbox.put(None)
        await loop.run_in_executor(None, self._thread.join)

    def submit(self, inputs: Arrays, size: int) -> asyncio.Future[Answer]:
        """Queue `size` items (at most `max_items`).

        Raises `Overloaded` when the queue has no room and `NotServing` when the batcher is not running.
        """
        if self._loop is None:
            raise NotServing("this policy is closing; try again shortly")
        if self._waiting + size > self._max_waiting:
            raise Overloaded(self._max_waiting)
        request = Waiting(inputs, size, self._loop.create_future(), time.perf_counter_ns())
        self._waiting += size
        self._inbox.put(request)
        return request.future

    def statistics(self) -> Statistics:
        return Statistics(self._waiting, self._batches, self._items, self._run_ns)

    def _work(self) -> None:
        """The thread: collect what waits, form a batch, run it, hand the answers to the event loop."""
        loop = self._loop
        assert loop is not None
        waiting: deque[Waiting] = deque()
        open_ = True
        while open_ or waiting:
            open_ = self._collect(waiting) and open_
            batch, cancelled = form(waiting, self._max_items)
            answers = self._answer(batch) if batch else []
            loop.call_soon_threadsafe(self._deliver, batch, answers, cancelled)

    def _collect(self, waiting: deque[Waiting]) -> bool:
        """Move the inbox into `waiting`; block only when there is nothing to do. False once closed."""
        try:
            request = self._inbox.get(block=not waiting)
            while request is not None:
                waiting.append(request)
                request = self._inbox.get_nowait()
        except Empty:
            return True
        return False

    def _answer(self, batch: list[Waiting]) -> list[Answer | ActserveError]:
        """One answer a request. When a shared call fails each request is run alone: none pays for another."""
        begun_ns = time.perf_counter_ns()
        try:
            outputs = self._call(batch)
        except ActserveError as error:
            return [error] if len(batch) == 1 else [self._answer([request])[0] for request in batch]
        run_ns = time.perf_counter_ns() - begun_ns
        self._run_ns += run_ns
        answers: list[Answer | ActserveError] = []
        start = 0
        for request in batch:
            part = {name: array[start : start + request.size] for name, array in outputs.items()}
            answers.append(Answer(part, begun_ns - request.since_ns, run_ns))
            start += request.size
        return answers

    def _call(self, batch: list[Waiting]) -> Arrays:
        self._batches += 1
        self._items += sum(request.size for request in batch)
        inputs = batch[0].inputs
        if len(batch) > 1:
            inputs = {name: np.concatenate([request.inputs[name] for request in batch]) for name in inputs}
        try:
            return self._run(inputs)
        except ActserveError:
            raise
        except Exception as error:  # the thread must outlive whatever a runtime does
            raise RuntimeFailure(f"inference failed: {type(error).__name__}") from error

    def _deliver(self, batch: list[Waiting], answers: list[Answer | ActserveError], cancelled: list[Waiting]) -> None:
        """In the event loop: settle the futures, free their places in the queue."""
        self._waiting -= sum(request.size for request in (*batch, *cancelled))
        for request, answer in zip(batch, answers, strict=True):
            if request.future.done():  # cancelled while it ran
                continue
            if isinstance(answer, ActserveError):
                request.future.set_exception(answer)
            else:
                request.future.set_result(answer)
