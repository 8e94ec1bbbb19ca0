"""One load process: one of the loops over its own connections, each with its script."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import urllib3

from actserve.client.operations import PolicyDescription
from actserve.core.errors import ServiceUnreachable
from actserve.loadtest.backends import Backend, backend
from actserve.loadtest.connection import HttpConnection, LoadConnection, Parts
from actserve.loadtest.loops import ClosedLoop, Loop, OpenLoop
from actserve.loadtest.tally import LoadTally

Progress = Callable[[float, int], None]  # seconds since the start, good answers so far


@dataclass(frozen=True)
class Job:
    """What one load process does; exactly one of `concurrency` and `rate` is set."""

    url: str
    uds: str | None
    via: str  # one of `BACKENDS`
    description: PolicyDescription
    seed: int
    concurrency: int | None  # closed loop: connections
    rate: float | None  # open loop: requests a second
    phase_s: float  # open loop: when the first falls due, so that several processes do not ask at the same moments
    most_connections: int  # open loop
    duration_s: float
    timeout_s: float
    token: str | None = None


@dataclass(frozen=True)
class ProcessResult:
    """What one load process has to tell."""

    tally: LoadTally
    in_time: int  # good answers that came within the duration
    connections: int  # the most that were open at a time
    cpu: float  # CPU seconds a second


def nothing() -> None: ...


def no_progress(_elapsed_s: float, _requests: int) -> None: ...


def work(job: Job, progress: Progress = no_progress, when_ready: Callable[[], None] = nothing) -> ProcessResult:
    """Connect, call `when_ready`, load. Not to be called from an event loop.

    Raises `ServiceUnreachable`, or `ServiceError` if the service refuses a session or a stream before the start.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_work(job, progress, when_ready))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform; asyncio's own loop is slower and does the same
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _work(job: Job, progress: Progress, when_ready: Callable[[], None]) -> ProcessResult:
    speaking = backend(job.via, job.url, job.description, job.seed, job.token)
    loop = _loop(job, speaking)
    try:
        try:
            await loop.prepare()
        except OSError as error:
            raise ServiceUnreachable(f"no connection to {job.uds or job.url}: {error}") from error
        when_ready()
        started, cpu = time.perf_counter(), time.process_time()
        await loop.run(lambda: progress(time.perf_counter() - started, loop.tally.requests))
        share = (time.process_time() - cpu) / (time.perf_counter() - started)
    finally:
        await _end(job, speaking)
    return ProcessResult(loop.tally, loop.in_time, loop.most_connections, share)


def _loop(job: Job, speaking: Backend) -> Loop:
    shared = (partial(_begin, job, speaking), speaking, job.duration_s, job.timeout_s)
    if job.rate is not None:
        return OpenLoop(*shared, rate=job.rate, phase_s=job.phase_s, most=job.most_connections)
    assert job.concurrency is not None
    return ClosedLoop(*shared, concurrency=job.concurrency)


async def _begin(job: Job, speaking: Backend, protocol: Callable[[], LoadConnection]) -> LoadConnection:
    """A connection that may be asked. Raises OSError or `ServiceError`."""
    async with asyncio.timeout(job.timeout_s):
        connection = await _connect(job, protocol)
        try:
            await speaking.begin(connection)
        except BaseException:
            connection.drop()
            raise
    if not connection.usable:
        raise ConnectionResetError("the service closed it at once")
    return connection


async def _connect(job: Job, protocol: Callable[[], LoadConnection]) -> LoadConnection:
    loop = asyncio.get_running_loop()
    if job.uds is not None:
        return (await loop.create_unix_connection(protocol, job.uds))[1]
    url = urllib3.util.parse_url(job.url)
    tls = url.scheme == "https"
    port = url.port or (443 if tls else 80)
    return (await loop.create_connection(protocol, (url.host or "").strip("[]"), port, ssl=tls or None))[1]


class Nobody:
    """Who is told of connections that only `exchange`."""

    def answered(self, connection: LoadConnection, status: int, body: bytes) -> None: ...

    def lost(self, connection: LoadConnection, unanswered: bool) -> None: ...


async def _end(job: Job, speaking: Backend) -> None:
    """End what was begun, as far as that can be done within the time-out; the service forgets the rest by itself."""
    connection: LoadConnection | None = None

    async def ask(request: Parts) -> tuple[int, bytes]:
        nonlocal connection
        try:
            if connection is None or not connection.usable:
                connection = await _connect(job, partial(HttpConnection, Nobody()))
            return await connection.exchange(*request)
        except OSError:
            return 0, b""

    with suppress(TimeoutError):
        async with asyncio.timeout(job.timeout_s):
            await speaking.end(ask)
    if connection is not None:
        connection.drop()
