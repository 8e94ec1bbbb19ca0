"""The closed and the open loop of a load test.

Closed: each of N connections sends its next request as soon as it has the answer. The service sets the pace.
Open: requests fall due at a fixed rate, even if the service is slow. Latency counts from the due time, so that a stall
shows in every request that it delays (Tene, "How not to measure latency", 2015).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine
from time import perf_counter_ns
from typing import Any
from weakref import WeakSet

from actserve.core.errors import ServiceError
from actserve.loadtest.backends import Backend
from actserve.loadtest.connection import LoadConnection
from actserve.loadtest.load_statistics import LoadStatistics
from actserve.loadtest.pacing import Pacer

Connect = Callable[[Callable[[], LoadConnection]], Coroutine[Any, Any, LoadConnection]]  # raises OSError, ServiceError
RETRY_S = 0.05  # between two attempts to open a connection
INITIAL_CONNECTIONS = 8  # an open loop opens these before the clock starts, so that it does not measure opening them
POLL_S = 0.02  # between two checks for timeouts and for the end


class LoadLoop(ABC):
    """Call `prepare`, then `run`, which ends at most `timeout_s` (and one poll) after `duration_s`."""

    def __init__(self, connect: Connect, backend: Backend, duration_s: float, timeout_s: float) -> None:
        self.statistics = LoadStatistics(backend.decode)
        self.answers_in_time = 0  # good answers within the duration
        self.peak_connections = 0  # the most that were open at the same time
        self._connect = connect
        self._backend = backend
        self._duration_ns = int(duration_s * 1e9)
        self._timeout_ns = int(timeout_s * 1e9)
        self._end_ns = 0  # no new requests from then on
        self._connections: set[LoadConnection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._created: WeakSet[LoadConnection] = WeakSet()  # includes connections cancelled while they were opening

    async def prepare(self) -> None:
        """Open the initial connections. Raises OSError if the service is unreachable, `ServiceError` if it refuses."""
        opening = (self._connect(self._protocol) for _ in range(self._initial_connections()))
        failed = None
        for opened in await asyncio.gather(*opening, return_exceptions=True):
            if not isinstance(opened, LoadConnection):
                failed = opened
            elif opened.usable:
                self._add(opened)
            else:
                failed = ConnectionResetError("the service closed the new connection at once")
        if failed is not None:
            await self._close()
            raise failed

    async def run(self, on_poll: Callable[[], None]) -> None:
        """Run from the first request to the last answer. Calls `on_poll` every `POLL_S`."""
        started = perf_counter_ns()
        self._end_ns = started + self._duration_ns
        self._start(started)
        try:
            while not self._finished(perf_counter_ns()):
                await asyncio.sleep(POLL_S)
                self._expire(perf_counter_ns() - self._timeout_ns)
                on_poll()
        finally:
            await self._close()

    # the events of a connection (`ConnectionListener`)

    def on_answer(self, connection: LoadConnection, status: int, body: bytes) -> None:
        now = perf_counter_ns()
        latency_us = (now - connection.due_ns) // 1000
        good = self.statistics.record_answer(connection.request_key, status, body, latency_us)
        if good and now <= self._end_ns:
            self.answers_in_time += 1
        if connection.usable:  # otherwise it is closing, and `on_lost` follows
            self._on_idle(connection, now)

    def on_lost(self, connection: LoadConnection, unanswered: bool) -> None:
        if unanswered:
            self.statistics.errors["connection"] += 1
        self._on_gone(connection)

    # closed and open loops differ in these

    @abstractmethod
    def _initial_connections(self) -> int:
        """The number of connections to open before the clock starts."""

    @abstractmethod
    def _start(self, now: int) -> None:
        """Start the clock: send or schedule the first requests."""

    @abstractmethod
    def _on_idle(self, connection: LoadConnection, now: int) -> None:
        """A connection is ready for the next request."""

    @abstractmethod
    def _on_gone(self, connection: LoadConnection) -> None:
        """A connection was closed or dropped."""

    def _has_requests(self, now: int) -> bool:
        """Whether requests are waiting or will fall due."""
        return now < self._end_ns

    def _finished(self, now: int) -> bool:
        """Whether all requests are sent and answered."""
        return not self._has_requests(now) and not any(connection.busy for connection in self._connections)

    def _expire(self, due_before_ns: int) -> None:
        """Give up the requests that fell due before `due_before_ns` and count them as timeouts."""
        for connection in [c for c in self._connections if c.busy and c.due_ns < due_before_ns]:
            self.statistics.errors["timeout"] += 1
            connection.drop()
            self._on_gone(connection)

    # shared by both loops

    def _protocol(self) -> LoadConnection:
        connection = self._backend.connection(self)
        self._created.add(connection)
        return connection

    def _add(self, connection: LoadConnection) -> None:
        self._connections.add(connection)
        self.peak_connections = max(self.peak_connections, len(self._connections))

    def _send(self, connection: LoadConnection, due_ns: int) -> None:
        connection.due_ns = due_ns
        connection.send_next()

    def _open_in_background(self) -> None:
        """Open a connection in a task. Retry until it opens or no requests remain."""
        task = asyncio.get_running_loop().create_task(self._open())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        while self._has_requests(perf_counter_ns()):
            try:
                connection = await self._connect(self._protocol)
            except (OSError, ServiceError) as error:  # TimeoutError is an OSError
                self.statistics.record_failed_open(error)
                await asyncio.sleep(RETRY_S)
            else:
                self._add(connection)
                self._on_idle(connection, perf_counter_ns())
                return

    async def _close(self) -> None:
        tasks = list(self._opening)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._created):
            connection.drop()
        self._connections.clear()
        await asyncio.sleep(0)  # lets the transports close


class ClosedLoop(LoadLoop):
    """`concurrency` connections. Each always has one unanswered request."""

    def __init__(
        self, connect: Connect, backend: Backend, duration_s: float, timeout_s: float, concurrency: int
    ) -> None:
        super().__init__(connect, backend, duration_s, timeout_s)
        self._concurrency = concurrency

    def _initial_connections(self) -> int:
        return self._concurrency

    def _start(self, now: int) -> None:
        for connection in list(self._connections):
            self._on_idle(connection, now)

    def _on_idle(self, connection: LoadConnection, now: int) -> None:
        if now < self._end_ns:
            self._send(connection, perf_counter_ns())

    def _on_gone(self, connection: LoadConnection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._open_in_background()


class OpenLoop(LoadLoop):
    """`rate` requests a second over at most `max_connections`. Without a free connection, requests wait in a queue."""

    def __init__(
        self,
        connect: Connect,
        backend: Backend,
        duration_s: float,
        timeout_s: float,
        rate: float,
        phase_s: float,
        max_connections: int,
    ) -> None:
        super().__init__(connect, backend, duration_s, timeout_s)
        self._interval_ns = 1e9 / rate
        self._total = max(1, round(rate * duration_s))
        self._max_connections = max_connections
        self._phase_ns = int(phase_s * 1e9)
        self._started_ns = 0  # when the first request falls due
        self._due_count = 0  # requests that have fallen due
        self._queue: deque[int] = deque()  # the due times of requests that are not sent yet
        self._free: list[LoadConnection] = []  # a stack: surplus connections stay unused
        self._pacer = Pacer(self._on_due)

    async def run(self, on_poll: Callable[[], None]) -> None:
        try:
            await super().run(on_poll)
        finally:
            self._pacer.stop()

    def _initial_connections(self) -> int:
        return min(INITIAL_CONNECTIONS, self._max_connections)

    def _start(self, now: int) -> None:
        self._started_ns = now + self._phase_ns
        self._free.extend(self._connections)
        self._pacer.start(self._started_ns, self._interval_ns, self._total)

    def _on_due(self) -> None:
        """Queue every request that is due by now."""
        now = perf_counter_ns()
        while self._due_count < self._total:
            due = self._started_ns + int(self._due_count * self._interval_ns)
            if due > now:
                break
            self._queue.append(due)
            self._due_count += 1
        self._dispatch()

    def _dispatch(self) -> None:
        """Send queued requests on free connections; open more connections for the rest."""
        while self._queue and self._free:
            connection = self._free.pop()
            if connection.usable:
                self._send(connection, self._queue.popleft())
        wanted = min(len(self._queue), self._max_connections - len(self._connections))
        for _ in range(wanted - len(self._opening)):
            self._open_in_background()

    def _on_idle(self, connection: LoadConnection, now: int) -> None:
        self._free.append(connection)
        self._dispatch()

    def _on_gone(self, connection: LoadConnection) -> None:
        self._connections.discard(connection)
        if connection in self._free:
            self._free.remove(connection)
        self._dispatch()

    def _has_requests(self, now: int) -> bool:
        return self._due_count < self._total or bool(self._queue) or super()._has_requests(now)

    def _expire(self, due_before_ns: int) -> None:
        while self._queue and self._queue[0] < due_before_ns:
            self._queue.popleft()
            self.statistics.errors["timeout"] += 1
        super()._expire(due_before_ns)
