"""The two ways to load a service, each in one event loop.

Closed: N connections, each asks again as soon as it is answered; the service sets the pace. Open: requests fall due at
a fixed rate whatever the service does, and latency counts from when they were due, so that a stall shows in every
request that it delays and not only in those it caught (Tene, "How not to measure latency", 2015).
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
from actserve.loadtest.pacing import Metronome
from actserve.loadtest.tally import LoadTally

Connect = Callable[[Callable[[], LoadConnection]], Coroutine[Any, Any, LoadConnection]]  # raises OSError, ServiceError
RETRY_S = 0.05  # before asking a service again that takes no further connection
FIRST_CONNECTIONS = 8  # of an open loop: before the clock starts, so that opening them is not what is measured
LOOK_S = 0.02  # how often time-outs and the end are looked for


class Loop(ABC):
    """What both ways share. `prepare`, then `run`, which ends at most `timeout_s` (and a look) after `duration_s`."""

    def __init__(self, connect: Connect, backend: Backend, duration_s: float, timeout_s: float) -> None:
        self.tally = LoadTally(backend.read)
        self.in_time = 0  # good answers that came within the duration
        self.most_connections = 0
        self._connect = connect
        self._backend = backend
        self._duration_ns = int(duration_s * 1e9)
        self._timeout_ns = int(timeout_s * 1e9)
        self._end_ns = 0  # from then on nothing new is asked
        self._connections: set[LoadConnection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._made: WeakSet[LoadConnection] = WeakSet()  # also those that were given up while they were opened

    async def prepare(self) -> None:
        """Open the connections that are wanted from the start. Raises OSError if the service cannot be reached, and
        `ServiceError` if it refuses one."""
        opening = (self._connect(self._protocol) for _ in range(self._at_first()))
        failed = None
        for opened in await asyncio.gather(*opening, return_exceptions=True):
            if not isinstance(opened, LoadConnection):
                failed = opened
            elif opened.usable:
                self._joined(opened)
            else:
                failed = ConnectionResetError("the service closed it at once")
        if failed is not None:
            await self._close()
            raise failed

    async def run(self, on_look: Callable[[], None]) -> None:
        """From the first request to the last answer; `on_look` is called now and then."""
        started = perf_counter_ns()
        self._end_ns = started + self._duration_ns
        self._start(started)
        try:
            while not self._finished(perf_counter_ns()):
                await asyncio.sleep(LOOK_S)
                self._expire(perf_counter_ns() - self._timeout_ns)
                on_look()
        finally:
            await self._close()

    # what a connection says

    def answered(self, connection: LoadConnection, status: int, body: bytes) -> None:
        now = perf_counter_ns()
        good = self.tally.answer(connection.question, status, body, (now - connection.since_ns) // 1000)
        if good and now <= self._end_ns:
            self.in_time += 1
        if connection.usable:  # otherwise the service closes it, and `lost` is next
            self._idle(connection, now)

    def lost(self, connection: LoadConnection, unanswered: bool) -> None:
        if unanswered:
            self.tally.errors["connection"] += 1
        self._left(connection)

    # what differs

    @abstractmethod
    def _at_first(self) -> int:
        """How many connections to open before the clock starts."""

    @abstractmethod
    def _start(self, now: int) -> None:
        """The clock starts."""

    @abstractmethod
    def _idle(self, connection: LoadConnection, now: int) -> None:
        """A connection can take the next request."""

    @abstractmethod
    def _left(self, connection: LoadConnection) -> None:
        """A connection is no more."""

    def _asking(self, now: int) -> bool:
        """There is, or will be, something to ask."""
        return now < self._end_ns

    def _finished(self, now: int) -> bool:
        """Nothing more to ask and nothing unanswered."""
        return not self._asking(now) and not any(connection.busy for connection in self._connections)

    def _expire(self, oldest: int) -> None:
        """Give up what has been due since before `oldest`."""
        for connection in [c for c in self._connections if c.busy and c.since_ns < oldest]:
            self.tally.errors["timeout"] += 1
            connection.drop()
            self._left(connection)

    # what both use

    def _protocol(self) -> LoadConnection:
        connection = self._backend.connection(self)
        self._made.add(connection)
        return connection

    def _joined(self, connection: LoadConnection) -> None:
        self._connections.add(connection)
        self.most_connections = max(self.most_connections, len(self._connections))

    def _send(self, connection: LoadConnection, since_ns: int) -> None:
        connection.since_ns = since_ns
        connection.ask()

    def _open_one(self) -> None:
        """Open a connection in the background, again and again until it works or there is nothing more to ask."""
        task = asyncio.get_running_loop().create_task(self._open())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        while self._asking(perf_counter_ns()):
            try:
                connection = await self._connect(self._protocol)
            except (OSError, ServiceError) as error:  # TimeoutError is an OSError
                self.tally.unopened(error)
                await asyncio.sleep(RETRY_S)
            else:
                self._joined(connection)
                self._idle(connection, perf_counter_ns())
                return

    async def _close(self) -> None:
        tasks = list(self._opening)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._made):
            connection.drop()
        self._connections.clear()
        await asyncio.sleep(0)  # the transports close


class ClosedLoop(Loop):
    """`concurrency` connections, each with one request under way all the time."""

    def __init__(
        self, connect: Connect, backend: Backend, duration_s: float, timeout_s: float, concurrency: int
    ) -> None:
        super().__init__(connect, backend, duration_s, timeout_s)
        self._concurrency = concurrency

    def _at_first(self) -> int:
        return self._concurrency

    def _start(self, now: int) -> None:
        for connection in list(self._connections):
            self._idle(connection, now)

    def _idle(self, connection: LoadConnection, now: int) -> None:
        if now < self._end_ns:
            self._send(connection, perf_counter_ns())

    def _left(self, connection: LoadConnection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._open_one()


class OpenLoop(Loop):
    """`rate` requests a second on as many connections as it takes, up to `most`; what finds none free waits in line."""

    def __init__(
        self,
        connect: Connect,
        backend: Backend,
        duration_s: float,
        timeout_s: float,
        rate: float,
        phase_s: float,
        most: int,
    ) -> None:
        super().__init__(connect, backend, duration_s, timeout_s)
        self._interval_ns = 1e9 / rate
        self._total = max(1, round(rate * duration_s))
        self._most = most
        self._phase_ns = int(phase_s * 1e9)
        self._started_ns = 0  # when the first falls due
        self._number = 0  # requests that have fallen due
        self._due: deque[int] = deque()  # since when; not sent yet
        self._free: list[LoadConnection] = []  # the last used first, so that a surplus stays unused
        self._metronome = Metronome(self._tick)

    async def run(self, on_look: Callable[[], None]) -> None:
        try:
            await super().run(on_look)
        finally:
            self._metronome.stop()

    def _at_first(self) -> int:
        return min(FIRST_CONNECTIONS, self._most)

    def _start(self, now: int) -> None:
        self._started_ns = now + self._phase_ns
        self._free.extend(self._connections)
        self._metronome.start(self._started_ns, self._interval_ns, self._total)

    def _tick(self) -> None:
        """Put everything in line that is due by now."""
        now = perf_counter_ns()
        while self._number < self._total:
            due = self._started_ns + int(self._number * self._interval_ns)
            if due > now:
                break
            self._due.append(due)
            self._number += 1
        self._serve()

    def _serve(self) -> None:
        while self._due and self._free:
            connection = self._free.pop()
            if connection.usable:
                self._send(connection, self._due.popleft())
        wanted = min(len(self._due), self._most - len(self._connections))
        for _ in range(wanted - len(self._opening)):
            self._open_one()

    def _idle(self, connection: LoadConnection, now: int) -> None:
        self._free.append(connection)
        self._serve()

    def _left(self, connection: LoadConnection) -> None:
        self._connections.discard(connection)
        if connection in self._free:
            self._free.remove(connection)
        self._serve()

    def _asking(self, now: int) -> bool:
        return self._number < self._total or bool(self._due) or super()._asking(now)

    def _expire(self, oldest: int) -> None:
        while self._due and self._due[0] < oldest:
            self._due.popleft()
            self.tally.errors["timeout"] += 1
        super()._expire(oldest)
