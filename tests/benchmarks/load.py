"""The load generator: one thread, non-blocking sockets, requests made ready before, every answer checked.

A question costs it some 30 µs, most of it the kernel's copy of 100 KB, so that one core can load any server here. If
it cannot, its own share of the core (`Tally.busy`) and the requests that it left out (`Tally.late`) show it.
"""

from __future__ import annotations

import gc
import random
import re
import select
import socket
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Self

from tests.benchmarks.questions import Questions, greeted

Address = tuple[str, int] | str  # a port, or a Unix socket

TIMEOUT_S = 10.0
LATE_S = 0.005  # an open loop drops a request that it cannot send within this time
IDLE_S = 2.0  # as a connection pool does: servers close idle connections, some after 5 s
SEND_BUFFER_BYTES = 1 << 20  # a screen leaves in one call
REFUSED = (429, 503)
RETRY_AFTER = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)


@dataclass
class Tally:
    """The results of a load. Latencies are in seconds: since a request was sent; in an open loop, since it was due."""

    good: array[float] = field(default_factory=lambda: array("d"))  # right answers
    refused: array[float] = field(default_factory=lambda: array("d"))  # told at once that there is no room
    errors: Counter[str] = field(default_factory=Counter)
    in_time: int = 0  # right answers before the end
    sent: int = 0
    late: int = 0  # open loop: left out, as this process was behind
    crowded: int = 0  # open loop: left out, as no connection was free, or the client still waited for an answer
    held_back: int = 0  # left out by clients that obey Retry-After
    busy: float = 0.0  # this process's share of its core; an open loop never sleeps, so its waiting is not counted


class Connection:
    __slots__ = ("blocked", "busy", "data", "question", "rest", "rests_until", "since", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.busy = False  # with a question
        self.blocked = False  # the socket takes no more of it for now
        self.question = 0
        self.since = 0.0
        self.rests_until = 0.0  # the time that a refusal's Retry-After gives
        self.data = b""  # of an answer that is not complete
        self.rest: memoryview | None = None  # of a request that is not sent completely


class Load:
    """A context manager that holds up to `most` connections; `closed` and `open` may be called again and again."""

    def __init__(self, address: Address, questions: Questions, most: int) -> None:
        self._address = address
        self._questions = questions
        self._most = most
        self._connections: dict[int, Connection] = {}  # by file descriptor
        self._idle: list[Connection] = []  # the last used first, so that a surplus stays unused; some may be lost
        self._epoll = select.epoll()
        self._known: list[set[bytes]] = [set() for _ in questions.requests]  # right answers, byte for byte
        self._next = 0  # question
        self._busy = 0  # connections
        self._end = 0.0
        self._tally = Tally()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.sock.close()
        self._epoll.close()

    def closed(self, seconds: float) -> Tally:
        """All connections ask, and ask again as soon as they are answered. Raises OSError if one cannot be opened."""
        now = perf_counter()
        asking = [found for _ in range(self._most) if (found := self._idle_or_new(now))]
        with self._running(seconds) as tally:
            before_s, begun = time.process_time(), perf_counter()
            for connection in asking:
                self._ask(connection, perf_counter())
            while self._busy:
                self._turn(TIMEOUT_S)
                while self._idle and (now := perf_counter()) < self._end:
                    self._ask(self._idle.pop(), now)
            tally.busy = (time.process_time() - before_s) / (perf_counter() - begun)
        return tally

    def open(self, rate: float, seconds: float, seed: int = 0) -> Tally:
        """Requests fall due at random (a Poisson process), so many a second, whatever becomes of those before."""
        with self._running(seconds) as tally:
            waited_s = 0.0
            for due in arrivals(perf_counter(), rate, seconds, random.Random(seed)):
                connection = None
                while connection is None and (now := perf_counter()) < due + LATE_S:
                    if not self._turn(0):
                        waited_s += perf_counter() - now
                    if now >= due:
                        connection = self._idle_or_new(now)
                if connection is not None:
                    self._ask(connection, due)
                elif self._busy == self._most:
                    tally.crowded += 1
                else:
                    tally.late += 1
            tally.busy = 1 - waited_s / seconds
            while self._busy:
                self._turn(TIMEOUT_S)
        return tally

    def obeying(self, rate: float, seconds: float, seed: int = 0) -> Tally:
        """As `open`, but every connection is one client, and all are equally likely to have the next request.

        A client asks nothing while it waits for an answer, nor, after a refusal, until its Retry-After is over.
        """
        with self._running(seconds) as tally:
            waited_s, chance = 0.0, random.Random(seed)
            clients = [*self._connections.values()]
            clients += [self._open() for _ in range(self._most - len(clients))]
            for due in arrivals(perf_counter(), rate, seconds, chance):
                while (now := perf_counter()) < due:
                    if not self._turn(0):
                        waited_s += perf_counter() - now
                number = chance.randrange(self._most)
                client = clients[number]
                if client.sock.fileno() < 0:
                    clients[number] = self._open()
                    clients[number].rests_until = client.rests_until
                    client = clients[number]
                if now > due + LATE_S:
                    tally.late += 1
                elif client.busy:
                    tally.crowded += 1
                elif now < client.rests_until:
                    tally.held_back += 1
                else:
                    self._ask(client, due)
            tally.busy = 1 - waited_s / seconds
            while self._busy:
                self._turn(TIMEOUT_S)
            self._idle = [*self._connections.values()]
        return tally

    @contextmanager
    def _running(self, seconds: float) -> Iterator[Tally]:
        self._tally = Tally()
        if seconds:  # one question each is no measurement, and a server that starts may need the core
            gc.collect()
        gc.disable()
        self._end = perf_counter() + seconds
        try:
            yield self._tally
        finally:
            gc.enable()

    def _turn(self, timeout_s: float) -> bool:
        """Read and write on all ready connections. Returns whether any was ready."""
        events = self._epoll.poll(timeout_s)
        for number, event in events:
            connection = self._connections[number]
            if event & select.EPOLLOUT:
                self._send(connection)
            if event & ~select.EPOLLOUT:
                self._receive(connection)
        if timeout_s and not events:
            self._tally.errors["no answer"] += self._busy
            for connection in [c for c in self._connections.values() if c.busy]:
                self._lose(connection)
        return bool(events)

    def _ask(self, connection: Connection, since: float) -> None:
        connection.question = self._next
        connection.since = since
        connection.busy = True
        self._next = (self._next + 1) % len(self._questions.requests)
        self._busy += 1
        self._tally.sent += 1
        connection.rest = memoryview(self._questions.requests[connection.question])
        self._send(connection)

    def _send(self, connection: Connection) -> None:
        assert connection.rest is not None
        with suppress(OSError):  # the error is found when reading
            connection.rest = connection.rest[connection.sock.send(connection.rest) :] or None
        if connection.blocked == (connection.rest is None):
            connection.blocked = not connection.blocked
            wanted = select.EPOLLIN | (select.EPOLLOUT if connection.blocked else 0)
            self._epoll.modify(connection.sock.fileno(), wanted)

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or not connection.busy:
            if connection.busy:
                self._tally.errors["connection lost"] += 1
            self._lose(connection)
            return
        data = connection.data + data
        answer = self._questions.split(data)
        if answer is None:
            connection.data = data
            return
        now = perf_counter()
        self._answered(connection, *answer, now)
        if answer[0] in REFUSED and (found := RETRY_AFTER.search(data)):
            connection.rests_until = now + int(found[1])
        if connection.rest or (answer[0] != 200 and b"connection: close" in data.lower()):
            self._lose(connection)
        else:
            connection.data = b""
            connection.busy = False
            self._busy -= 1
            self._idle.append(connection)

    def _answered(self, connection: Connection, status: int, body: bytes, now: float) -> None:
        tally, known = self._tally, self._known[connection.question]
        if status in REFUSED:
            tally.refused.append(now - connection.since)
        elif status != 200:
            tally.errors[f"status {status}"] += 1
        elif body in known or self._questions.is_right(connection.question, body):
            known.add(body)
            tally.good.append(now - connection.since)
            tally.in_time += now < self._end
        else:
            tally.errors[f"question {connection.question}: wrong answer {body[:80]!r}"] += 1

    def _idle_or_new(self, now: float) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.sock.fileno() >= 0:
                if now - connection.since < IDLE_S:
                    return connection
                self._lose(connection)
        return self._open() if len(self._connections) < self._most else None

    def _open(self) -> Connection:
        unix = isinstance(self._address, str)
        sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        try:
            sock.settimeout(TIMEOUT_S)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            sock.connect(self._address)
            if not unix:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._questions.greeting:
                _greet(sock, self._questions.greeting)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        connection = self._connections[sock.fileno()] = Connection(sock)
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        return connection

    def _lose(self, connection: Connection) -> None:
        self._busy -= connection.busy
        del self._connections[connection.sock.fileno()]
        connection.sock.close()


def arrivals(begin: float, rate: float, seconds: float, chance: random.Random) -> Iterator[float]:
    due = begin + chance.expovariate(rate)
    while due < begin + seconds:
        yield due
        due += chance.expovariate(rate)


def _greet(sock: socket.socket, greeting: bytes) -> None:
    sock.sendall(greeting)
    data = b""
    while not greeted(data):
        received = sock.recv(1 << 16)
        if not received:
            raise ConnectionResetError("the server closed the connection instead of greeting")
        data += received
