"""The cost of an action on one core, of actserve and of other servers. Run: python -m tests.benchmarks.cost

Every contender takes its turn once a round, at 1, 8 and 64 connections in a closed loop: its server with all that it
starts on one core, the load generator on another. T is what the tutorial's graph costs in bare ONNX Runtime, one screen
at a time. All figures come from this one run; a row with any error or any wrong answer is invalid.

Only ours, in a minute: --only 'actserve*' --rounds 1 --seconds 1
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tests.benchmarks import bare, machine, report
from tests.benchmarks.contenders import CONTENDERS, Contender
from tests.benchmarks.ground import Ground, prepare
from tests.benchmarks.load import Load
from tests.benchmarks.questions import Questions
from tests.benchmarks.server import DoesNotServe, Server, core_busy_s, cores, cpu_s, memory_mb

WARM_S = 0.5  # the longest load before a measurement


@dataclass(frozen=True)
class Cell:
    """One measurement: one server, so many connections. Latencies are of requests, everything else is of actions."""

    contender: str
    connections: int
    actions: int  # right ones
    cpu_us: float  # of all the server's processes, user and system, an action
    rate: float  # right actions a second
    p50_ms: float
    p99_ms: float
    p999_ms: float
    rss_mb: float  # of all the server's processes, at the end
    pss_mb: float
    generator: float  # its share of its core: near 1, it was the limit
    others: float  # the larger share that other processes had of either core
    errors: dict[str, int]


@dataclass(frozen=True)
class Mark:
    """A moment, and the seconds of CPU time until then."""

    at_s: float
    server_s: float
    own_s: float
    cores_s: tuple[float, float]  # busy, by any process: the server's core, and ours

    @staticmethod
    def now(pids: set[int], on: tuple[int, int]) -> Mark:
        return Mark(time.perf_counter(), cpu_s(pids), time.process_time(), (core_busy_s(on[0]), core_busy_s(on[1])))

    def others(self, later: Mark) -> float:
        """The larger share of a core that neither idled nor was ours or the server's."""
        ours_s = (later.server_s - self.server_s, later.own_s - self.own_s)
        others_s = (
            after - before - ours for before, after, ours in zip(self.cores_s, later.cores_s, ours_s, strict=True)
        )
        return max(0.0, *others_s) / (later.at_s - self.at_s)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,…", default="*", help=", ".join(c.name for c in CONTENDERS))
    parser.add_argument("--connections", default="1,8,64")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", type=Path, default=Path("models_store"), help="with pong")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, to the single measurement")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="cost.md and cost.png")
    found = parser.parse_args()
    found.connections = [int(count) for count in found.connections.split(",")]
    found.contenders = [c for c in CONTENDERS if any(fnmatch(c.name, name) for name in found.only.split(","))]
    if found.seconds <= 0 or found.rounds < 1 or min(found.connections) < 1 or not found.contenders:
        parser.error("expected a known name, and seconds, rounds and connections above 0")
    return found


def measure(
    server: Server, questions: Questions, contender: str, connections: int, seconds: float, on: tuple[int, int]
) -> Cell:
    """Load a warm server and measure the cost. Raises `DoesNotServe`, or OSError if a process of it is gone."""
    with Load(server.address, questions, connections) as load:
        warm = load.closed(min(WARM_S, seconds))
        pids = server.pids()
        before = Mark.now(pids, on)
        tally = load.closed(seconds)
        after = Mark.now(pids, on)
        rss_mb, pss_mb = memory_mb(pids)
    if server.pids() != pids:
        raise DoesNotServe("its processes come and go, so that what they cost cannot be told")
    if not tally.good:
        raise DoesNotServe(f"no right answer: {dict(tally.errors)}")
    p50_ms, p99_ms, p999_ms = np.percentile(tally.good, (50, 99, 99.9)) * 1e3
    actions = len(tally.good) * questions.frames
    refused = Counter({"refused": len(warm.refused) + len(tally.refused)})
    return Cell(
        contender=contender,
        connections=connections,
        actions=actions,
        cpu_us=(after.server_s - before.server_s) / actions * 1e6,
        rate=tally.in_time * questions.frames / seconds,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        p999_ms=p999_ms,
        rss_mb=rss_mb,
        pss_mb=pss_mb,
        generator=tally.busy,
        others=before.others(after),
        errors=dict(warm.errors + tally.errors + refused),
    )


class Run:
    """All contenders in turn. `found` has the results, JSON-able."""

    def __init__(self, wanted: argparse.Namespace, console: Console) -> None:
        self.found: dict[str, Any] = {
            "settings": {name: getattr(wanted, name) for name in ("connections", "seconds", "rounds")},
            "bare": [],  # a round each
            "cells": [],
            "starts_s": {},  # by contender: from the process's start to its first right answer
            "left_out": {},  # by contender: why
        }
        self._wanted = wanted
        self._console = console
        self._on = cores()

    def play(self) -> None:
        wanted = self._wanted
        self._say("screens and programs")
        able = [contender for contender in wanted.contenders if contender.missing() is None]
        ground = prepare(wanted.store, {contender.policy for contender in able})
        self.found["machine"] = machine.describe(*self._on)
        os.sched_setaffinity(0, {self._on[1]})
        for number in range(wanted.rounds):
            self._say(f"round {number + 1}/{wanted.rounds}: bare programs")
            programs = {name: file for name, file in ground.programs.items() if file.suffix == ".onnx"}
            found = bare.measure(programs, ground.pixels, self._on[0], wanted.seconds / 5)
            self.found["bare"].append(found)
            # Each round begins with another contender, so that none is always the first.
            first = number * len(wanted.contenders) // wanted.rounds
            for contender in wanted.contenders[first:] + wanted.contenders[:first]:
                if contender.name not in self.found["left_out"]:
                    self._turn(contender, ground)

    def _turn(self, contender: Contender, ground: Ground) -> None:
        if missing := contender.missing():
            self._leave_out(contender, f"it needs {missing}")
            return
        questions = contender.way(ground.screens[contender.policy])
        store, program = ground.stores[contender.policy], ground.programs[contender.policy]
        seconds = self._wanted.seconds
        try:
            with contender.start(store, program, self._on[0]) as server:
                start_s = server.first_answer_s(questions)
                cells = [
                    measure(server, questions, contender.name, connections, seconds, self._on)
                    for connections in self._wanted.connections
                ]
        except DoesNotServe as error:
            self._leave_out(contender, str(error))
            return
        self.found["starts_s"].setdefault(contender.name, []).append(start_s)
        self.found["cells"] += map(asdict, cells)
        errors = " ".join(str(cell.errors) for cell in cells if cell.errors)
        costs = " / ".join(f"{cell.cpu_us:,.0f}" for cell in cells)
        self._say(f"  {contender.title}: {costs} µs an action, {start_s:.2f} s to start {errors}")

    def _leave_out(self, contender: Contender, why: str) -> None:
        self.found["left_out"][contender.name] = why
        self._say(f"  {contender.title} is left out: {why}")

    def _say(self, what: str) -> None:
        self._console.print(what, highlight=False, markup=False)


def main() -> int:
    wanted = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no server outlives us
    run = Run(wanted, Console(stderr=True))
    run.play()
    if wanted.json:
        wanted.json.write_text(json.dumps(run.found, indent=1) + "\n")
    if wanted.docs:
        report.write(run.found, wanted.docs)
    return report.show(run.found)


if __name__ == "__main__":
    sys.exit(main())
