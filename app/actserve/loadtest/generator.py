"""The load generator: how fast a policy is served, how long its answers take, and whether they are right.

Every answer is checked: status 200, and the same observation (of a policy with state: the same step of an episode) gets
the same answer each time. A policy that is swapped during the run therefore shows as inconsistent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from actserve.client.remote_policy import RemotePolicy
from actserve.core.errors import UsageError
from actserve.loadtest import process as worker
from actserve.loadtest import processes as crew
from actserve.loadtest.backends import BACKENDS, backend
from actserve.loadtest.process import Job, ProcessResult
from actserve.loadtest.tally import LoadTally

CONCURRENCY = 8
MOST_CONNECTIONS = 512  # of the open loop, all processes together; beyond it requests wait, and the wait counts
TIMEOUT_S = 5.0
PILOT_S = 0.5
SATURATED = 0.9  # the CPU share of a load process from which on it may be what limits the rate


@dataclass(frozen=True)
class LoadReport:
    """What came of a load. Latencies are of good answers only."""

    policy: str
    via: str
    requests: int  # good answers
    rate: float  # good answers a second, of those that came within the duration
    errors: dict[str, int]  # by kind: http_503:overloaded (via oip: http_503), connection, timeout, inconsistent
    latency_ms: dict[str, float]  # p50, p90, p99, p999, max; in the open loop from when a request was due
    duration_s: float
    concurrency: int | None  # closed loop
    target_rate: float | None  # open loop, requests a second
    connections: int  # the most that were open at a time
    processes: int
    client_cpu: float  # the busiest load process's share of one core: near 1, the client was the limit

    def as_json(self) -> dict[str, Any]:
        """The object that `actserve load --json` prints."""
        unused = "concurrency" if self.concurrency is None else "target_rate"
        return {name: value for name, value in vars(self).items() if name != unused}


def load(
    url: str,
    *,
    policy: str | None = None,
    via: str = "http",
    concurrency: int | None = None,
    rate: float | None = None,
    duration_s: float = 10.0,
    seed: int = 0,
    processes: int | None = None,
    uds: str | None = None,
    token: str | None = None,
    timeout_s: float = TIMEOUT_S,
    on_progress: worker.Progress | None = None,
) -> LoadReport:
    """Load one policy with random observations for `duration_s`, and at most `timeout_s` more for the last answers and
    once more to end the sessions.

    `via`: how the service is spoken to, one of `backends.BACKENDS`. http: each request is an episode of its own.
    session, stream, oip: each connection is a session, a stream or (of a policy with state) a sequence.
    `concurrency`: closed loop on so many connections; with neither, `CONCURRENCY`. `rate`: open loop, requests/s.
    `processes`: by default one, or as many as there are cores when a pilot shows that one would be the limit.
    Raises `ServiceUnreachable` or `ServiceError` when there is nothing to load, `UsageError` for a wrong wish.
    """
    if via not in BACKENDS:
        raise UsageError(f"expected to load via {', '.join(BACKENDS)}; got {via!r}")
    if concurrency is not None and rate is not None:
        raise UsageError("a concurrency (closed loop) and a rate (open loop) exclude each other")
    if concurrency is None and rate is None:
        concurrency = CONCURRENCY
    if min(duration_s, timeout_s, 1 if concurrency is None else concurrency, 1 if rate is None else rate) <= 0:
        raise UsageError("concurrency, rate, duration and timeout are positive numbers")
    with RemotePolicy(url, policy, uds, token) as remote:
        job = Job(
            url=url,
            uds=uds,
            via=via,
            description=remote.description,
            seed=seed,
            concurrency=concurrency,
            rate=rate,
            phase_s=0.0,
            most_connections=MOST_CONNECTIONS,
            duration_s=duration_s,
            timeout_s=timeout_s,
            token=token,
        )
    count = _enough_processes(job) if processes is None else processes
    count = max(1, min(count, concurrency or count))
    progress = on_progress or worker.no_progress
    outcomes = [worker.work(job, progress)] if count == 1 else crew.work(_shares(job, count), progress)
    return _report(job, outcomes)


def _report(job: Job, outcomes: list[ProcessResult]) -> LoadReport:
    total = LoadTally(backend(job.via, job.url, job.description, job.seed).read)
    for outcome in outcomes:
        total.add(outcome.tally)
    return LoadReport(
        policy=job.description.name,
        via=job.via,
        requests=total.requests,
        rate=sum(outcome.in_time for outcome in outcomes) / job.duration_s,
        errors=dict(total.errors),
        latency_ms=total.latency_ms(),
        duration_s=job.duration_s,
        concurrency=job.concurrency,
        target_rate=job.rate,
        connections=sum(outcome.connections for outcome in outcomes),
        processes=len(outcomes),
        client_cpu=round(max(outcome.cpu for outcome in outcomes), 3),
    )


def _enough_processes(job: Job) -> int:
    """One, or all cores if a pilot with one shows that it would be busy all the time."""
    if _cores() == 1:
        return 1
    pilot = worker.work(replace(job, duration_s=min(PILOT_S, job.duration_s), timeout_s=min(PILOT_S, job.timeout_s)))
    return _cores() if pilot.cpu > SATURATED else 1


def _cores() -> int:
    """Those that this process may run on, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(job: Job, count: int) -> list[Job]:
    return [
        replace(
            job,
            concurrency=job.concurrency and job.concurrency // count + (index < job.concurrency % count),
            rate=job.rate and job.rate / count,
            phase_s=index / job.rate if job.rate else 0.0,
            most_connections=max(1, job.most_connections // count),
        )
        for index in range(count)
    ]
