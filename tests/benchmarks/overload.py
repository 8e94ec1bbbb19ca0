"""A service under more load than it can bear. Run: python -m tests.benchmarks.overload

The service has one core, the load generator another. First its peak is found: the most right answers a second that any
rate of requests gets out of it. Then 0.8, 1, 2 and 5 times as many requests fall due a second, at random moments and
whatever becomes of those before, on as many connections as it takes. Latencies count from when a request was due.

The same rates are offered twice: by clients that take no notice of a refusal, and by clients that wait for their answer
and then for the time that `Retry-After` gives.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.alone import alone
from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.load import LATE_S, Load

CONNECTIONS = 64  # of the closed loop that says where to look for the peak
SEARCHED = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # times what that found
FIGURES = ("goodput", "p50_ms", "p99_ms", "refused_a_second", "refused_p99_ms")
HEADER = ("clients", "× peak", "due/s", "goodput/s", "p50 ms", "p99 ms", "refused/s", "refused in p99 ms", "of peak")
WARM_S = 1.0  # in which the connections of the obeying clients are accepted


def arguments() -> argparse.Namespace:
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=names, default="actserve", help="whom to ask, and how")
    parser.add_argument("--times", default="0.8,1,2,5", help="the peak")
    parser.add_argument("--connections", type=int, default=2048, help="at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="at each rate")
    parser.add_argument("--rounds", type=int, default=3, help="the table has their medians")
    parser.add_argument("--store", type=Path, default=Path("models_store"), help="with pong")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def step(load: Load, rate: float, seconds: float, obeys: bool = False) -> dict[str, Any]:
    """The results of so many requests a second; JSON-able."""
    tally = load.obeying(rate, seconds) if obeys else load.open(rate, seconds)
    return {
        "obeys": obeys,
        "due_a_second": rate,
        "sent_a_second": tally.sent / seconds,
        "goodput": tally.in_time / seconds,
        "p50_ms": _percentile_ms(tally.good, 50),
        "p99_ms": _percentile_ms(tally.good, 99),
        "refused_a_second": len(tally.refused) / seconds,
        "refused_p99_ms": _percentile_ms(tally.refused, 99),
        "late": tally.late,
        "crowded": tally.crowded,
        "held_back": tally.held_back,
        "generator": tally.busy,
        "errors": dict(tally.errors),
    }


def _percentile_ms(seconds: Sequence[float], percentile: float) -> float | None:
    return float(np.percentile(seconds, percentile)) * 1e3 if seconds else None


def line(tried: Sequence[dict[str, Any]], peak: float) -> list[str]:
    """A row of the table: the medians of the rounds at one rate."""
    first = tried[0]
    shares = sorted(found["goodput"] / peak for found in tried)
    return [
        "obey" if first["obeys"] else "do not",
        f"{first['due_a_second'] / peak:.1f}",
        f"{first['due_a_second']:,.0f}",
        *(_median([found[name] for found in tried], 1 if name.endswith("ms") else 0) for name in FIGURES),
        f"{median(shares):.0%} ({shares[0]:.0%} to {shares[-1]:.0%})",
    ]


def _median(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):,.{digits}f}" if known else "–"


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
            rates = [float(times) * peak for times in wanted.times.split(",")]
            steps = [step(load, rate, wanted.seconds) for _ in range(wanted.rounds) for rate in rates]
        with Load(server.address, questions, wanted.connections) as load:
            load.obeying(peak / 2, WARM_S)
            steps += [step(load, rate, wanted.seconds, obeys=True) for _ in range(wanted.rounds) for rate in rates]
    found = {"contender": wanted.only, "machine": machine, "peak": peak, "search": search, "steps": steps}
    if wanted.json:
        wanted.json.write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    return int(any(tried["errors"] for tried in steps))


def show(found: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(*HEADER, title=f"{found['contender']}: peak {found['peak']:,.0f} right answers a second")
    rows: dict[tuple[bool, float], list[dict[str, Any]]] = {}
    for tried in found["steps"]:
        rows.setdefault((tried["obeys"], tried["due_a_second"]), []).append(tried)
    for row in rows.values():
        table.add_row(*line(row, found["peak"]))
    console.print(table)
    for (obeys, rate), row in rows.items():
        late, crowded, held_back = (sum(tried[name] for tried in row) for name in ("late", "crowded", "held_back"))
        errors = [tried["errors"] for tried in row if tried["errors"]]
        reasons = {
            "the generator was behind": late,
            "the client still waited for an answer" if obeys else "no connection was free": crowded,
            "Retry-After was not over": held_back,
        }
        unsent = ", ".join(f"{count:,} ({reason})" for reason, count in reasons.items() if count)
        clients = "clients that obey" if obeys else "clients that do not"
        if unsent:
            console.print(f"{clients}, {rate / found['peak']:.1f} × the peak: never sent: {unsent}", highlight=False)
        if errors:
            console.print(f"{clients}, {rate / found['peak']:.1f} × the peak: errors: {errors}", markup=False)
    console.print(f"Latencies are of right answers, and count up to {LATE_S * 1e3:.0f} ms for a late generator.")


if __name__ == "__main__":
    sys.exit(main())
