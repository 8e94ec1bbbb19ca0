"""The gain of a second worker. Run: python -m tests.benchmarks.workers

One worker has a core to itself, and the load generator another. Two workers have both cores, on which the generator
runs as well. So throughput alone would say how much the generator takes; what counts is what comes out of a second of
CPU time that the service was given, of all its processes, and two workers can be given twice as much:

    scaling = 2 × (actions per CPU second with two workers) / (actions per CPU second with one)

Two cores of a virtual machine can be one, to the host, that does two things at a time: then a second of CPU time is
worth less once both are busy. How much less, bare programs say, one alone and then one on each core: their scaling is
the most that workers can have here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import bare, machine
from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.ground import prepare
from tests.benchmarks.load import Load
from tests.benchmarks.server import cores, cpu_s

WARM_S = 0.5
BATCH = "8"  # of the bare programs


def measure(workers: int, wanted: argparse.Namespace, ground: Any) -> dict[str, Any]:
    """One measurement, JSON-able. Raises `DoesNotServe`."""
    server_core, own_core = cores()
    (contender,) = (c for c in CONTENDERS if c.name == "actserve")
    contender = replace(contender, command=f"{contender.command} --workers {workers}")
    on = (server_core,) if workers == 1 else (server_core, own_core)
    os.sched_setaffinity(0, {own_core} if workers == 1 else {*on})
    questions = contender.way(ground.screens[contender.policy])
    with contender.start(ground.stores[contender.policy], ground.programs[contender.policy], *on) as server:
        server.first_answer_s(questions)
        with Load(server.address, questions, wanted.connections) as load:
            load.closed(WARM_S)
            each = sorted(server.pids())
            before_s, began_s = [cpu_s({pid}) for pid in each], time.perf_counter()
            tally = load.closed(wanted.seconds)
            took_s = time.perf_counter() - began_s
            spent_s = [cpu_s({pid}) - before for pid, before in zip(each, before_s, strict=True)]
    return {
        "workers": workers,
        "actions_a_second": len(tally.good) / took_s,
        "cpu_us": sum(spent_s) / len(tally.good) * 1e6,
        "given": sum(spent_s) / took_s,
        "shares": sorted((spent / sum(spent_s) for spent in spent_s), reverse=True)[:workers],
        "errors": dict(tally.errors) | ({"refused": len(tally.refused)} if tally.refused else {}),
    }


def most(ground: Any, seconds: float) -> float:
    """The scaling of bare programs."""
    program = {"pong": ground.programs["pong"]}

    def cost(core: int) -> float:
        return bare.measure(program, ground.pixels, core, seconds)["pong"][BATCH]["cpu_us"]

    first, second = cores()
    alone = cost(first)
    with ThreadPoolExecutor(2) as both:
        return 2 * alone / mean(both.map(cost, (first, second)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", type=Path, default=Path("models_store"), help="with pong")
    parser.add_argument("--json", type=Path, metavar="FILE")
    wanted = parser.parse_args()
    progress = Console(stderr=True)
    progress.print("screens and programs")
    ground = prepare(wanted.store)
    described = machine.describe(*cores())
    found, bounds = [], []
    for number in range(wanted.rounds):
        bounds.append(most(ground, wanted.seconds / 3))
        progress.print(f"round {number + 1}: bare programs: {bounds[-1]:.2f}", highlight=False)
        for workers in (1, 2):
            found.append(measure(workers, wanted, ground))
            cost, given = found[-1]["cpu_us"], found[-1]["given"]
            progress.print(f"round {number + 1}: {workers}: {cost:.0f} µs an action, {given:.2f} CPUs", highlight=False)
    scaling = [2 * one["cpu_us"] / two["cpu_us"] for one, two in zip(found[::2], found[1::2], strict=True)]
    if wanted.json:
        results = {"machine": described, "found": found, "scaling": scaling, "bare": bounds}
        wanted.json.write_text(json.dumps(results, indent=1) + "\n")
    table = Table("workers", "actions/s", "CPUs given", "µs/action", "shares of the workers")
    for workers in (1, 2):
        rows = [row for row in found if row["workers"] == workers]
        shares = [median(row["shares"][rank] for row in rows) for rank in range(workers)]
        table.add_row(
            str(workers),
            *(f"{median(row[key] for row in rows):,.{digits}f}"
              for key, digits in (("actions_a_second", 0), ("given", 2), ("cpu_us", 0))),
            " ".join(f"{share:.0%}" for share in shares),
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for what, ratios in (("scaling", scaling), ("of bare programs", bounds)):
        console.print(f"{what}: {median(ratios):.2f}; by round {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    errors = [row["errors"] for row in found if row["errors"]]
    if errors:
        console.print(f"errors: {errors}", markup=False)
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
