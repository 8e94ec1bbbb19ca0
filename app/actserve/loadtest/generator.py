"""The load generator: measures the request rate, the latency and the errors of a served policy.

It checks every answer: the status is 200, and equal observations get equal answers. For a policy with state, equal
steps of an episode get equal answers. If the policy is swapped during the test, its answers count as inconsistent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from actserve.client.remote_policy import RemotePolicy
from actserve.core.errors import UsageError
from actserve.loadtest import load_process, process_pool
from actserve.loadtest.backends import BACKENDS, create_backend
from actserve.loadtest.load_process import LoadJob, LoadJobResult
from actserve.loadtest.load_statistics import LoadStatistics

CONCURRENCY = 8
MAX_CONNECTIONS = 512  # open loop, all processes together; further requests wait, and latency includes the wait
TIMEOUT_S = 5.0
PILOT_S = 0.5
SATURATED_CPU_SHARE = 0.9  # a load process above it may be the bottleneck


@dataclass(frozen=True)
class LoadReport:
    """The result of a load test. Latencies are of good answers only."""

    policy: str
    via: str
    requests: int  # good answers
    rate: float  # good answers a second, counted within the duration
    errors: dict[str, int]  # by kind: http_503:overloaded (via oip: http_503), connection, timeout, inconsistent
    latency_ms: dict[str, float]  # p50, p90, p99, p999, max; in the open loop from the due time of the request
    duration_s: float
    concurrency: int | None  # closed loop
    target_rate: float | None  # open loop, requests a second
    connections: int  # the most that were open at the same time
    processes: int
    client_cpu: float  # the busiest load process's share of one core; near 1 the client was the bottleneck

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
    on_progress: load_process.Progress = load_process.no_progress,
) -> LoadReport:
    """Send random observations to one policy for `duration_s` seconds and report rate, latency and errors.

    The test may take `timeout_s` longer for the last answers, and `timeout_s` again to end the sessions.

    `via`: the protocol, one of `backends.BACKENDS`. http: each request is its own episode. session, stream, oip: each
    connection is a session, a stream or, for a policy with state, a sequence.
    `concurrency`: closed loop over this many connections. `rate`: open loop, requests/s. Without both: a closed loop
    over `CONCURRENCY` connections.
    `processes`: default one, or one per core if a short pilot shows that one process would be the bottleneck.
    Raises `ServiceUnreachable` or `ServiceError` if the test cannot start, `UsageError` for wrong arguments.
    """
    if via not in BACKENDS:
        raise UsageError(f"expected via to be one of {', '.join(BACKENDS)}; got {via!r}")
    if concurrency is not None and rate is not None:
        raise UsageError("concurrency (closed loop) and rate (open loop) exclude each other; give one of them")
    if concurrency is None and rate is None:
        concurrency = CONCURRENCY
    if min(duration_s, timeout_s, 1 if concurrency is None else concurrency, 1 if rate is None else rate) <= 0:
        raise UsageError("expected concurrency, rate, duration and timeout to be positive numbers")
    with RemotePolicy(url, policy, uds, token) as remote:
        job = LoadJob(
            url=url,
            uds=uds,
            via=via,
            description=remote.description,
            seed=seed,
            concurrency=concurrency,
            rate=rate,
            phase_s=0.0,
            max_connections=MAX_CONNECTIONS,
            duration_s=duration_s,
            timeout_s=timeout_s,
            token=token,
        )
    count = _needed_processes(job) if processes is None else processes
    count = max(1, min(count, concurrency or count))
    if count == 1:
        results = [load_process.run_job(job, on_progress)]
    else:
        results = process_pool.run_jobs(_split(job, count), on_progress)
    return _report(job, results)


def _report(job: LoadJob, results: list[LoadJobResult]) -> LoadReport:
    total = LoadStatistics(create_backend(job.via, job.url, job.description, job.seed).decode)
    for result in results:
        total.merge(result.statistics)
    return LoadReport(
        policy=job.description.name,
        via=job.via,
        requests=total.requests,
        rate=sum(result.answers_in_time for result in results) / job.duration_s,
        errors=dict(total.errors),
        latency_ms=total.latency_ms(),
        duration_s=job.duration_s,
        concurrency=job.concurrency,
        target_rate=job.rate,
        connections=sum(result.peak_connections for result in results),
        processes=len(results),
        client_cpu=round(max(result.cpu_share for result in results), 3),
    )


def _needed_processes(job: LoadJob) -> int:
    """One, or one per core if a pilot shows that one process would use a whole core."""
    if _cores() == 1:
        return 1
    short = replace(job, duration_s=min(PILOT_S, job.duration_s), timeout_s=min(PILOT_S, job.timeout_s))
    return _cores() if load_process.run_job(short).cpu_share > SATURATED_CPU_SHARE else 1


def _cores() -> int:
    """The cores that this process may use; all of the host where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _split(job: LoadJob, count: int) -> list[LoadJob]:
    return [
        replace(
            job,
            concurrency=job.concurrency and job.concurrency // count + (index < job.concurrency % count),
            rate=job.rate and job.rate / count,
            phase_s=index / job.rate if job.rate else 0.0,
            max_connections=max(1, job.max_connections // count),
        )
        for index in range(count)
    ]
