"""Requests of a batcher, the result of a batch, and the choice of the next batch."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from time import perf_counter_ns

from actserve.core.errors import ActserveError
from actserve.core.signature import Arrays
from actserve.engine.recorders import StepRecorder


@dataclass(frozen=True, eq=False)
class Answer:
    """Every output, each (size, *shape), and how long the request was queued and run."""

    outputs: Arrays
    queue_ns: int  # until its batch was formed
    run_ns: int  # of the runtime call of the whole batch


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
    recorder: StepRecorder | None = None  # None: it is not recorded

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """Whether its client has disconnected. It is settled all the same."""

    @abstractmethod
    def inputs(self) -> Arrays:
        """Each (size, *shape)."""

    @abstractmethod
    def settle(self, outcome: BatchResult, start: int) -> None:
        """Called once, in the event loop, with the batch's result; this request's items begin at `start`. If it raises,
        it is called once more, with the error."""

    @abstractmethod
    def abandon(self) -> None:
        """Called if no answer can be given: free everything, and let the client know. Never raises."""


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


class ArrayRequest(BatchRequest):
    """A request with arrays of its own, and a future for its `Answer`."""

    def __init__(self, inputs: Arrays, size: int, patience_ns: int = 0, recorder: StepRecorder | None = None) -> None:
        self.future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.size = size
        self._inputs = inputs
        self.since_ns = perf_counter_ns()
        self.patience_ns = patience_ns
        self.recorder = recorder

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

    def abandon(self) -> None:
        self.future.cancel()
