"""Several load processes: they connect, say so, start together, and tell how it goes and what came of it.

What they say is JSON over pipes: {"ready"}, then {"elapsed_s", "requests"} now and then, then {"outcome", "tally"}; or
{"unreachable"} or {"refused"}.
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
from actserve.loadtest.process import Job, ProcessResult, Progress
from actserve.loadtest.process import work as work_alone
from actserve.loadtest.tally import LoadTally

START_S = 60.0  # for a process to come up; also how long one that is done may take to say what came of it


def work(jobs: list[Job], progress: Progress) -> list[ProcessResult]:
    """Each job in a process of its own, all at the same time. Raises as `worker.work` does, or `ClientError` if a
    process dies. A script that gets here must be importable: with `if __name__ == "__main__"` where it starts."""
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
            theirs.close()  # so that we are told when the process dies
        for pipe in pipes:
            _hear(pipe)
        for pipe in pipes:
            pipe.send_bytes(b"go")
        return _follow(pipes, jobs[0].duration_s + 2 * jobs[0].timeout_s + START_S, progress)
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


def _follow(pipes: list[Connection], within_s: float, progress: Progress) -> list[ProcessResult]:
    """Pass on how it goes until every process has said what came of it."""
    counts = dict.fromkeys(range(len(pipes)), 0)
    outcomes: dict[int, ProcessResult] = {}
    deadline = time.monotonic() + within_s
    while len(outcomes) < len(pipes):
        speaking = wait([pipe for index, pipe in enumerate(pipes) if index not in outcomes], timeout=1.0)
        for index, pipe in enumerate(pipes):
            if pipe not in speaking:
                continue
            said = _hear(pipe)
            if "outcome" in said:
                outcomes[index] = ProcessResult(tally=LoadTally.from_json(said["tally"]), **said["outcome"])
            else:
                counts[index] = said["requests"]
                progress(said["elapsed_s"], sum(counts.values()))
        if time.monotonic() > deadline:
            raise ClientError(f"{len(pipes) - len(outcomes)} load processes did not end within {within_s:.0f} s")
    return [outcomes[index] for index in sorted(outcomes)]


def _hear(pipe: Connection) -> dict[str, Any]:
    if not pipe.poll(START_S):
        raise ClientError(f"a load process said nothing for {START_S:.0f} s")
    try:
        said: dict[str, Any] = json.loads(pipe.recv_bytes())
    except EOFError:
        raise ClientError("a load process ended before it was done") from None
    if "unreachable" in said:
        raise ServiceUnreachable(said["unreachable"])
    if "refused" in said:
        raise ServiceError(*said["refused"])
    return said


def _process(job: Job, pipe: Connection) -> None:
    """The main function of a load process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it goes to the whole group; the parent ends us

    def say(**what: Any) -> None:
        pipe.send_bytes(json.dumps(what).encode())

    def wait_for_the_others() -> None:
        say(ready=True)
        pipe.recv_bytes()

    try:
        done = work_alone(
            job, lambda elapsed_s, requests: say(elapsed_s=elapsed_s, requests=requests), wait_for_the_others
        )
    except ServiceUnreachable as error:
        say(unreachable=error.message)
    except ServiceError as error:
        say(refused=(error.status, error.reason, error.message.partition(": ")[2]))
    else:
        fields = {"in_time": done.in_time, "connections": done.connections, "cpu": done.cpu}
        say(outcome=fields, tally=done.tally.to_json())
