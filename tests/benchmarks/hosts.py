"""The limits of a service on many hosts. Run: python -m tests.benchmarks.hosts

* **balancer**: CPU time of an action in nginx, configured as in docs/scale.md, and in the service behind it.
* **sessions**: steps a second that one session file takes from one process and from several, without a program; and
  the time of a write, in which no other process can write.
* **polling**: requests to a remote store for one poll of one worker, counted, and for a fleet, calculated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from actserve.cli.tools import local_service as local
from actserve.loadtest.generator import load
from actserve.server.sessions import SessionLimits, Sessions
from actserve.server.sessions.session_file import SessionFile
from actserve.store.local import ModelStore
from actserve.store.remote import RemoteStore
from tests.benchmarks.server import cpu_s, tree
from tests.benchmarks.sessions import step_all
from tests.network import URL, Network, network, upload
from tests.proxy import nginx
from tests.shipped import SHIPPED

POLICY = "pong"
CONNECTIONS = 64
SESSIONS = 100  # of each process
POLL_S = 2.0  # the default of ACTSERVE_POLL_S
FLEETS = ((10, 16), (50, 16), (200, 16))  # hosts, workers of each
POLICIES = (1, 10, 100)


def balancer(rounds: int, seconds: float) -> dict[str, Any]:
    """µs of CPU time an action, medians of the rounds: of the service, directly and behind nginx, and of nginx."""
    found: dict[str, list[float]] = {"direct": [], "behind nginx": [], "nginx": []}
    rates: dict[str, list[float]] = {"direct": [], "behind nginx": []}
    patient = {**os.environ, "ACTSERVE_MAX_WAIT_MS": "2000"}
    with (
        tempfile.TemporaryDirectory() as folder,
        local.serve(SHIPPED, "--runtime", "onnx", environment=patient) as service,
        nginx(
            Path(folder),
            "scale.md",
            dict.fromkeys(("10.0.0.1:8000", "10.0.0.2:8000"), service.url.removeprefix("http://")),
        ) as (url, process),
    ):
        for _ in range(rounds):
            for name, address in (("direct", service.url), ("behind nginx", url)):
                parts = {name: tree(service.pid), "nginx": tree(process.pid)}
                before = {part: cpu_s(pids) for part, pids in parts.items()}
                report = load(address, policy=POLICY, concurrency=CONNECTIONS, duration_s=seconds, processes=1)
                if report.errors:
                    raise SystemExit(f"{address}: {report.errors}")
                rates[name].append(report.rate)
                for part, pids in parts.items():
                    if part == name or name != "direct":
                        found[part].append((cpu_s(pids) - before[part]) / report.requests * 1e6)
    return {
        "µs an action": {part: median(values) for part, values in found.items()},
        "actions/s": {name: median(values) for name, values in rates.items()},
    }


def steps_of_process(path: Path, seconds: float) -> tuple[int, float]:
    """Steps that this process takes in `seconds`, and its CPU time."""
    with Sessions(path, SessionLimits()) as sessions:
        begin = partial(sessions.begin, POLICY, 1)
        begun = [asyncio.run(sessions.when_unlocked(begin)) for _ in range(SESSIONS)]
        asyncio.run(step_all(sessions, begun, 2))
        count, until, before_s = 0, time.monotonic() + seconds, time.process_time()
        while time.monotonic() < until:
            count += len(asyncio.run(step_all(sessions, begun, 1)))
        return count, time.process_time() - before_s


def session_file(processes: int, seconds: float) -> dict[str, float]:
    """Steps a second, and µs of CPU time for each, of so many processes on one file."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        path = Path(folder) / "sessions"
        list(pool.map(steps_of_process, [path] * processes, [0.2] * processes))  # the processes have begun
        taken = list(pool.map(steps_of_process, [path] * processes, [seconds] * processes))
    count, cpu = sum(steps for steps, _ in taken), sum(cpu_s for _, cpu_s in taken)
    return {"steps/s": count / seconds, "µs a step": cpu / count * 1e6}


def write_us(seconds: float) -> float:
    """The median time that the write of a step takes, in µs. Meanwhile no other process can write to the file."""
    taken: list[float] = []
    change = SessionFile.change

    def timed(file: SessionFile, statement: str, *values: Any) -> int:
        begun = time.perf_counter()
        changed = change(file, statement, *values)
        if statement.startswith("UPDATE session"):
            taken.append((time.perf_counter() - begun) * 1e6)
        return changed

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(SessionFile, "change", timed):
        steps_of_process(Path(folder) / "sessions", seconds)
    return median(taken)


def requests_of_a_poll(policies: int) -> int:
    """Requests to a remote store with so many policies that one poll of one worker makes, when nothing is new."""
    manifest = ModelStore(SHIPPED).resolve(POLICY).folder / "manifest.json"
    with network(), tempfile.TemporaryDirectory() as folder:
        for index in range(policies):
            version = Path(folder) / f"policy-{index}" / "1"
            version.mkdir(parents=True)
            (version / manifest.name).write_bytes(manifest.read_bytes())
        upload(ModelStore(Path(folder)))
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": folder}):
            store = RemoteStore(URL)
        with (
            mock.patch.object(Network, "ls", autospec=True, side_effect=Network.ls) as lists,
            mock.patch.object(Network, "open", autospec=True, side_effect=Network.open) as reads,
        ):
            store.refresh()
            for name in store.names():
                store.versions(name)
        return lists.call_count + reads.call_count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    polls = {policies: requests_of_a_poll(policies) for policies in POLICIES}
    held_us = write_us(arguments.seconds)
    found: dict[str, dict[str, Any]] = {
        "sessions": {f"processes: {count}": session_file(count, arguments.seconds) for count in (1, 2, 4)}
        | {"the write alone": {"µs": held_us, "steps/s at most": 1e6 / held_us}},
        "polling": {
            f"{hosts} hosts, {workers} workers each": {
                policies: hosts * workers * requests / POLL_S for policies, requests in polls.items()
            }
            for hosts, workers in FLEETS
        },
        "balancer": balancer(arguments.rounds, arguments.seconds),
    }
    if arguments.json:
        print(json.dumps(found))
        return
    for part, figures in found.items():
        print(part)
        for name, row in figures.items():
            print(f"  {name!s:<28}" + ", ".join(f"{key}: {value:,.0f}" for key, value in row.items()))
    print(f"{os.cpu_count()} cores; polling in requests a second, by the number of policies, every {POLL_S:g} s")


if __name__ == "__main__":
    main()
