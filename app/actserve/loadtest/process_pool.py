"""A load test in several processes: they connect, start together, report their progress and return their results.

Each process sends JSON messages over a pipe: {"ready"}, then {"elapsed_s", "requests"} repeatedly, then {"result",
"statistics"}. On an error it sends {"unreachable"} or {"refused"} instead.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from actserve.core.errors import ClientError, ServiceError, ServiceUnreachable
from actserve.loadtest.load_process import LoadJob, LoadJobResult, Progress, run_job
from actserve.loadtest.load_statistics import LoadStatistics

PROCESS_TIMEOUT_S = 60.0  # for a process to start; also the longest silence between two messages


def run_jobs(jobs: list[LoadJob], progress: Progress) -> list[LoadJobResult]:
    """Run all jobs at the same time, each in its own process. Raises as `run_job` does, or `ClientError` if a process
    dies. The processes import the calling script: guard its entry with `if __name__ == "__main__"`."""
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    pipes: list[Connection] = []
    try:
        for job in jobs:
            ours, theirs = context.Pipe()
            pipes.append(ours)
            process = context.Process(target=_process, args=(job, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()  # so that our end reports when the process dies
        for pipe in pipes:
            _receive(pipe)
        for pipe in pipes:
            pipe.send_bytes(b"go")
        return _collect(pipes, jobs[0].duration_s + 2 * jobs[0].timeout_s + PROCESS_TIMEOUT_S, progress)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()
            process.close()
        for pipe in pipes:
            pipe.close()


def _collect(pipes: list[Connection], timeout_s: float, progress: Progress) -> list[LoadJobResult]:
    """Report the progress of all processes together until each has sent its result."""
    counts = dict.fromkeys(range(len(pipes)), 0)
    results: dict[int, LoadJobResult] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        readable = wait([pipe for index, pipe in enumerate(pipes) if index not in results], timeout=1.0)
        for index, pipe in enumerate(pipes):
            if pipe not in readable:
                continue
            message = _receive(pipe)
            if "result" in message:
                statistics = LoadStatistics.from_json(message["statistics"])
                results[index] = LoadJobResult(statistics, **message["result"])
            else:
                counts[index] = message["requests"]
                progress(message["elapsed_s"], sum(counts.values()))
        if time.monotonic() > deadline:
            raise ClientError(f"{len(pipes) - len(results)} load processes did not end within {timeout_s:.0f} s")
    return [results[index] for index in sorted(results)]


def _receive(pipe: Connection) -> dict[str, Any]:
    if not pipe.poll(PROCESS_TIMEOUT_S):
        raise ClientError(f"a load process sent no message for {PROCESS_TIMEOUT_S:.0f} s")
    try:
        message: dict[str, Any] = json.loads(pipe.recv_bytes())
    except EOFError:
        raise ClientError("a load process ended before it sent its result") from None
    if "unreachable" in message:
        raise ServiceUnreachable(message["unreachable"])
    if "refused" in message:
        raise ServiceError(*message["refused"])
    return message


def _process(job: LoadJob, pipe: Connection) -> None:
    """The main function of a load process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us

    def send(**message: Any) -> None:
        pipe.send_bytes(json.dumps(message).encode())

    def wait_for_start() -> None:
        send(ready=True)
        pipe.recv_bytes()

    try:
        result = run_job(job, lambda elapsed_s, requests: send(elapsed_s=elapsed_s, requests=requests), wait_for_start)
    except ServiceUnreachable as error:
        send(unreachable=error.message)
    except ServiceError as error:
        send(refused=(error.status, error.reason, error.message.partition(": ")[2]))
    else:
        fields = {name: value for name, value in vars(result).items() if name != "statistics"}
        send(result=fields, statistics=result.statistics.to_json())
