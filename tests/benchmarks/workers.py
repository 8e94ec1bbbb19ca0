"""The gain of a second worker. Run: python -m tests.benchmarks.workers

Two workers have both cores, and the load generator runs on the same two cores. So throughput alone would say how much
the generator takes. The benchmark counts actions per second of CPU time of all the service's processes; two workers can
get twice as much of it:

    scaling = 2 × (actions per CPU second with two workers) / (actions per CPU second with one)

One worker is measured twice: with a core to itself, and with the generator on its core. The generator copies 100 KB for
each request. With two workers each core has a worker and half of the generator, so compare with the second measurement.

Two cores of a virtual machine can be one, to the host, that does two things at a time: then a second of CPU time is
worth less once both are busy. Bare programs show how much less: one alone, then one on each core.
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
CASES = ((1, False), (1, True), (2, True))  # workers, and whether the generator runs on their cores


def measure(
    workers: int, shares_core: bool, both: tuple[int, int], wanted: argparse.Namespace, ground: Any
) -> dict[str, Any]:
    """One measurement on `both` cores, JSON-able. `shares_core`: the generator runs on the cores of the workers.

    Raises `DoesNotServe`.
    """
    server_core, own_core = both
    (contender,) = (c for c in CONTENDERS if c.name == "actserve")
    contender = replace(contender, command=f"{contender.command} --workers {workers}")
    on = (server_core,) if workers == 1 else (server_core, own_core)
    os.sched_setaffinity(0, {*on} if shares_core else {own_core})
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
        "shares_core": shares_core,
        "actions_a_second": len(tally.good) / took_s,
        "cpu_us": sum(spent_s) / len(tally.good) * 1e6,
        "given": sum(spent_s) / took_s,
        "shares": sorted((spent / sum(spent_s) for spent in spent_s), reverse=True)[:workers],
        "errors": dict(tally.errors) | ({"refused": len(tally.refused)} if tally.refused else {}),
    }


def most(both: tuple[int, int], ground: Any, seconds: float) -> float:
    """The scaling of bare programs."""
    program = {"pong": ground.programs["pong"]}

    def cost(core: int) -> float:
        return bare.measure(program, ground.pixels, core, seconds)["pong"][BATCH]["cpu_us"]

    os.sched_setaffinity(0, both)
    alone = cost(both[0])
    with ThreadPoolExecutor(2) as pool:
        return 2 * alone / mean(pool.map(cost, both))


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
    both = cores()
    described = machine.describe(*both)
    found, bounds = [], []
    for number in range(wanted.rounds):
        bounds.append(most(both, ground, wanted.seconds / 3))
        progress.print(f"round {number + 1}: bare programs: {bounds[-1]:.2f}", highlight=False)
        for workers, shares_core in CASES:
            found.append(measure(workers, shares_core, both, wanted, ground))
            cost, given = found[-1]["cpu_us"], found[-1]["given"]
            progress.print(f"round {number + 1}: {workers}: {cost:.0f} µs an action, {given:.2f} CPUs", highlight=False)
    costs = {case: [row["cpu_us"] for row in found if (row["workers"], row["shares_core"]) == case] for case in CASES}
    two = costs[2, True]
    scaling = {
        "of a worker with a core to itself": [2 * one / cost for one, cost in zip(costs[1, False], two, strict=True)],
        "of a worker that shares its core": [2 * one / cost for one, cost in zip(costs[1, True], two, strict=True)],
        "of bare programs": bounds,
    }
    if wanted.json:
        results = {"machine": described, "found": found, "scaling": scaling}
        wanted.json.write_text(json.dumps(results, indent=1) + "\n")
    table = Table("workers", "generator", "actions/s", "CPUs given", "µs/action", "shares of the workers")
    for workers, shares_core in CASES:
        rows = [row for row in found if (row["workers"], row["shares_core"]) == (workers, shares_core)]
        shares = [median(row["shares"][rank] for row in rows) for rank in range(workers)]
        table.add_row(
            str(workers),
            "on the same core" + "s" * (workers - 1) if shares_core else "on another core",
            *(f"{median(row[key] for row in rows):,.{digits}f}"
              for key, digits in (("actions_a_second", 0), ("given", 2), ("cpu_us", 0))),
            " ".join(f"{share:.0%}" for share in shares),
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for what, ratios in scaling.items():
        console.print(f"scaling {what}: {median(ratios):.2f}; by round {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    errors = [row["errors"] for row in found if row["errors"]]
    if errors:
        console.print(f"errors: {errors}", markup=False)
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
