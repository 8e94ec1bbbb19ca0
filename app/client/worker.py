"""One load process: ready-made requests, sent by one of the loops over its own connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import urllib3

from app.client.connection import Connection
from app.client.loops import ClosedLoop, Loop, OpenLoop
from app.client.operations import act_path, request_body
from app.client.tally import Tally
from app.errors import ServiceUnreachable
from app.signature import Signature

OBSERVATIONS = 32  # different ones are sent in turn

Progress = Callable[[float, int], None]  # seconds since the start, good answers so far


@dataclass(frozen=True)
class Job:
    """What one load process does; exactly one of `concurrency` and `rate` is set."""

    url: str
    uds: str | None
    policy: str
    signature: Signature
    seed: int
    concurrency: int | None  # closed loop: connections
    rate: float | None  # open loop: requests a second
    phase_s: float  # open loop: when the first falls due, so that several processes do not ask at the same moments
    most_connections: int  # open loop
    duration_s: float
    timeout_s: float


@dataclass(frozen=True)
class Outcome:
    """What one load process has to tell."""

    tally: Tally
    in_time: int  # good answers that came within the duration
    connections: int  # the most that were open at a time
    cpu: float  # CPU seconds a second


def nothing() -> None: ...


def no_progress(_elapsed_s: float, _requests: int) -> None: ...


def work(job: Job, progress: Progress = no_progress, when_ready: Callable[[], None] = nothing) -> Outcome:
    """Connect, call `when_ready`, load. Raises `ServiceUnreachable`. Not to be called from an event loop."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_work(job, progress, when_ready))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform; asyncio's own loop is slower and does the same
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _work(job: Job, progress: Progress, when_ready: Callable[[], None]) -> Outcome:
    loop = _loop(job)
    try:
        await loop.prepare()
    except OSError as error:
        raise ServiceUnreachable(f"no connection to {job.uds or job.url}: {error}") from error
    when_ready()
    started, cpu = time.perf_counter(), time.process_time()
    await loop.run(lambda: progress(time.perf_counter() - started, loop.tally.requests))
    share = (time.process_time() - cpu) / (time.perf_counter() - started)
    return Outcome(loop.tally, loop.in_time, loop.most_connections, share)


def _loop(job: Job) -> Loop:
    shared = (partial(_connect, job), _requests(job), job.duration_s, job.timeout_s)
    if job.rate is not None:
        return OpenLoop(*shared, rate=job.rate, phase_s=job.phase_s, most=job.most_connections)
    assert job.concurrency is not None
    return ClosedLoop(*shared, concurrency=job.concurrency)


async def _connect(job: Job, protocol: Callable[[], Connection]) -> Connection:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(job.timeout_s):
        if job.uds is not None:
            return (await loop.create_unix_connection(protocol, job.uds))[1]
        url = urllib3.util.parse_url(job.url)
        tls = url.scheme == "https"
        port = url.port or (443 if tls else 80)
        return (await loop.create_connection(protocol, (url.host or "").strip("[]"), port, ssl=tls or None))[1]


def _requests(job: Job) -> list[bytes]:
    """Whole HTTP requests with one random observation each. The same in every process with the same seed."""
    rng = np.random.default_rng(job.seed)
    batches = {spec.name: spec.sample(rng, OBSERVATIONS) for spec in job.signature.observations}
    url = urllib3.util.parse_url(job.url)
    path = (url.path or "").rstrip("/") + act_path(job.policy)
    requests = []
    for index in range(OBSERVATIONS):
        item = {name: batch[index : index + 1] for name, batch in batches.items()}
        content_type, body = request_body(job.signature, item, batched=False)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + bytes(body))
    return requests
