"""A service under more load than it can bear. Run: python -m tests.benchmarks.overload

The service has one core, the load generator another. First its peak is found: the most right answers a second that any
rate of requests gets out of it. Then 0.8, 1, 2 and 5 times as many requests fall due a second, at random moments and
whatever becomes of those before, on as many connections as it takes. Latencies count from when a request was due.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.alone import alone
from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.load import LATE_S, Load

CONNECTIONS = 64  # of the closed loop that says where to look for the peak
SEARCHED = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # times what that found
HEADER = ("× peak", "due/s", "sent/s", "goodput/s", "p50 ms", "p99 ms", "refused/s", "refused in p99 ms", "generator")


def arguments() -> argparse.Namespace:
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=names, default="actserve", help="whom to ask, and how")
    parser.add_argument("--times", default="0.8,1,2,5", help="the peak")
    parser.add_argument("--connections", type=int, default=2048, help="at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="at each rate")
    parser.add_argument("--store", type=Path, default=Path("models_store"), help="with pong")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def step(load: Load, rate: float, seconds: float) -> dict[str, Any]:
    """The results of so many requests a second; JSON-able."""
    tally = load.open(rate, seconds)
    return {
        "due_a_second": rate,
        "sent_a_second": tally.sent / seconds,
        "goodput": tally.in_time / seconds,
        "p50_ms": _percentile_ms(tally.good, 50),
        "p99_ms": _percentile_ms(tally.good, 99),
        "refused_a_second": len(tally.refused) / seconds,
        "refused_p99_ms": _percentile_ms(tally.refused, 99),
        "late": tally.late,
        "crowded": tally.crowded,
        "generator": tally.busy,
        "errors": dict(tally.errors),
    }


def _percentile_ms(seconds: Sequence[float], percentile: float) -> float | None:
    return float(np.percentile(seconds, percentile)) * 1e3 if seconds else None


def line(found: dict[str, Any], peak: float) -> list[str]:
    figures = ("due_a_second", "sent_a_second", "goodput", "p50_ms", "p99_ms", "refused_a_second", "refused_p99_ms")
    return [
        f"{found['due_a_second'] / peak:.1f}",
        *("–" if found[name] is None else f"{found[name]:,.{1 if name.endswith('ms') else 0}f}" for name in figures),
        f"{found['generator']:.0%}",
    ]


def main() -> int:
    wanted = arguments()
    progress = Console(stderr=True)
    with alone(wanted.only, wanted.store, progress) as (server, questions, machine):
        with Load(server.address, questions, CONNECTIONS) as few:
            few.closed(1)
            near = few.closed(wanted.seconds).in_time / wanted.seconds
        with Load(server.address, questions, wanted.connections) as load:
            search = []
            for times in SEARCHED:
                search.append(step(load, times * near, wanted.seconds))
                progress.print(f"due {times * near:,.0f}/s: goodput {search[-1]['goodput']:,.0f}/s", highlight=False)
            peak = max(tried["goodput"] for tried in search)
            steps = [step(load, float(times) * peak, wanted.seconds) for times in wanted.times.split(",")]
    found = {"contender": wanted.only, "machine": machine, "peak": peak, "search": search, "steps": steps}
    if wanted.json:
        wanted.json.write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    return int(any(tried["errors"] for tried in steps))


def show(found: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(*HEADER, title=f"{found['contender']}: peak {found['peak']:,.0f} right answers a second")
    for tried in found["steps"]:
        table.add_row(*line(tried, found["peak"]))
    console.print(table)
    for tried in found["steps"]:
        times = f"At {tried['due_a_second'] / found['peak']:.1f} × the peak"
        if tried["late"]:
            console.print(f"{times} the generator was the limit: {tried['late']:,} requests were never sent.")
        if tried["crowded"]:
            console.print(f"{times} no connection was free for {tried['crowded']:,} requests: they were never sent.")
        if tried["errors"]:
            console.print(f"{times} errors: {tried['errors']}", markup=False)
    console.print(f"Latencies are of right answers, and count up to {LATE_S * 1e3:.0f} ms for a late generator.")


if __name__ == "__main__":
    sys.exit(main())
