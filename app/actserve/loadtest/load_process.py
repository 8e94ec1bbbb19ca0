"""A load test in one process: a closed or an open loop over its own connections."""

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
from actserve.loadtest.backends import Backend, create_backend
from actserve.loadtest.connection import HttpLoadConnection, LoadConnection, RequestParts
from actserve.loadtest.load_statistics import LoadStatistics
from actserve.loadtest.loops import ClosedLoop, LoadLoop, OpenLoop

Progress = Callable[[float, int], None]  # seconds since the start, good answers so far


@dataclass(frozen=True)
class LoadJob:
    """The settings of one load process. Exactly one of `concurrency` and `rate` is set."""

    url: str
    uds: str | None
    via: str  # one of `BACKENDS`
    description: PolicyDescription
    seed: int
    concurrency: int | None  # closed loop: connections
    rate: float | None  # open loop: requests a second
    phase_s: float  # open loop: when the first request falls due; spreads the requests of several processes
    max_connections: int  # open loop
    duration_s: float
    timeout_s: float
    token: str | None = None


@dataclass(frozen=True)
class LoadJobResult:
    statistics: LoadStatistics
    answers_in_time: int  # good answers within the duration
    peak_connections: int  # the most that were open at the same time
    cpu_share: float  # CPU seconds per second


def no_progress(_elapsed_s: float, _requests: int) -> None: ...


def run_job(
    job: LoadJob, progress: Progress = no_progress, on_ready: Callable[[], None] = lambda: None
) -> LoadJobResult:
    """Connect, call `on_ready`, run the load test. Do not call it from an event loop.

    Raises `ServiceUnreachable`. Raises `ServiceError` if the service refuses a session or a stream before the start.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run_job(job, progress, on_ready))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # uvloop does not support every platform; asyncio's own loop is slower
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _run_job(job: LoadJob, progress: Progress, on_ready: Callable[[], None]) -> LoadJobResult:
    backend = create_backend(job.via, job.url, job.description, job.seed, job.token)
    loop = _create_loop(job, backend)
    try:
        try:
            await loop.prepare()
        except OSError as error:
            raise ServiceUnreachable(f"no connection to {job.uds or job.url}: {error}") from error
        on_ready()
        started, cpu = time.perf_counter(), time.process_time()
        await loop.run(lambda: progress(time.perf_counter() - started, loop.statistics.requests))
        cpu_share = (time.process_time() - cpu) / (time.perf_counter() - started)
    finally:
        await _clean_up(job, backend)
    return LoadJobResult(loop.statistics, loop.answers_in_time, loop.peak_connections, cpu_share)


def _create_loop(job: LoadJob, backend: Backend) -> LoadLoop:
    shared = (partial(_open_connection, job, backend), backend, job.duration_s, job.timeout_s)
    if job.rate is not None:
        return OpenLoop(*shared, rate=job.rate, phase_s=job.phase_s, max_connections=job.max_connections)
    assert job.concurrency is not None
    return ClosedLoop(*shared, concurrency=job.concurrency)


async def _open_connection(job: LoadJob, backend: Backend, protocol: Callable[[], LoadConnection]) -> LoadConnection:
    """A connection that is ready for its first request. Raises OSError or `ServiceError`."""
    async with asyncio.timeout(job.timeout_s):
        connection = await _connect(job, protocol)
        try:
            await backend.prepare(connection)
        except BaseException:
            connection.drop()
            raise
    if not connection.usable:
        raise ConnectionResetError("the service closed the new connection at once")
    return connection


async def _connect(job: LoadJob, protocol: Callable[[], LoadConnection]) -> LoadConnection:
    loop = asyncio.get_running_loop()
    if job.uds is not None:
        return (await loop.create_unix_connection(protocol, job.uds))[1]
    url = urllib3.util.parse_url(job.url)
    tls = url.scheme == "https"
    port = url.port or (443 if tls else 80)
    return (await loop.create_connection(protocol, (url.host or "").strip("[]"), port, ssl=tls or None))[1]


class _NullListener:
    """For connections that only `exchange`, which calls no listener."""

    def on_answer(self, connection: LoadConnection, status: int, body: bytes) -> None: ...

    def on_lost(self, connection: LoadConnection, unanswered: bool) -> None: ...


async def _clean_up(job: LoadJob, backend: Backend) -> None:
    """End the sessions and sequences of the test, within the timeout. The service expires the rest."""
    connection: LoadConnection | None = None

    async def send(request: RequestParts) -> tuple[int, bytes]:
        nonlocal connection
        try:
            if connection is None or not connection.usable:
                connection = await _connect(job, partial(HttpLoadConnection, _NullListener()))
            return await connection.exchange(*request)
        except OSError:
            return 0, b""

    with suppress(TimeoutError):
        async with asyncio.timeout(job.timeout_s):
            await backend.clean_up(send)
    if connection is not None:
        connection.drop()
