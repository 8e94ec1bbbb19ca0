"""Does a service that works for long stay as it was? Run: python -m tests.benchmarks.soak

The service has one core, the load generator another. First its peak is found; then 70 % of it falls due, for half an
hour by default, on connections that are new for each stretch of it. After each stretch: memory, open files, latency. In
the end the trend of each over all stretches but the first few, in which what is kept for good is made.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.alone import alone
from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.load import Load, Tally
from tests.benchmarks.server import Server, cpu_s, memory_mb

CONNECTIONS = 64
WARM = 0.1  # of the stretches


@dataclass(frozen=True)
class Stretch:
    minutes: float  # since the begin, at its end
    goodput: float  # right answers a second
    refused: int
    errors: int
    p50_ms: float
    p99_ms: float
    rss_mb: float  # of all processes
    pss_mb: float
    files: int  # of all processes
    cpu_us: float  # of all processes, for each answer


def arguments() -> argparse.Namespace:
    names = [contender.name for contender in CONTENDERS if contender.kind == "ours"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=names, default="actserve", help="how to ask")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--stretch", type=float, default=30, metavar="SECONDS")
    parser.add_argument("--share", type=float, default=0.7, help="of the peak")
    parser.add_argument("--store", type=Path, default=Path("models_store"), help="with pong")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser.parse_args()


def measured(server: Server, tally: Tally, seconds: float, minutes: float, spent_s: float) -> Stretch:
    pids = server.pids()
    rss_mb, pss_mb = memory_mb(pids)
    p50, p99 = np.percentile(tally.good, [50, 99]) * 1e3
    return Stretch(
        minutes=minutes,
        goodput=len(tally.good) / seconds,
        refused=len(tally.refused),
        errors=sum(tally.errors.values()),
        p50_ms=float(p50),
        p99_ms=float(p99),
        rss_mb=rss_mb,
        pss_mb=pss_mb,
        files=sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        cpu_us=spent_s / len(tally.good) * 1e6,
    )


def trends(stretches: Sequence[Stretch]) -> dict[str, float]:
    """The change from the first of these to the last, by linear regression; JSON-able."""
    settled = stretches[int(len(stretches) * WARM) :]
    at = np.array([stretch.minutes for stretch in settled])
    found = {}
    for name in ("p50_ms", "p99_ms", "rss_mb", "pss_mb", "files", "cpu_us"):
        values = np.array([getattr(stretch, name) for stretch in settled], float)
        slope = np.polyfit(at, values, 1)[0] if len(settled) > 1 else 0.0
        found[name] = float(slope * (at[-1] - at[0]))
    return found


def main() -> int:
    wanted = arguments()
    progress = Console(stderr=True, highlight=False)
    stretches: list[Stretch] = []
    with alone(wanted.only, wanted.store, progress) as (server, questions, machine):
        with Load(server.address, questions, CONNECTIONS) as load:
            load.closed(1)
            peak = load.closed(5).in_time / 5
        rate = wanted.share * peak
        progress.print(f"peak {peak:,.0f}/s; {rate:,.0f}/s for {wanted.minutes:g} minutes")
        for index in range(max(1, round(wanted.minutes * 60 / wanted.stretch))):
            before_s = cpu_s(server.pids())
            with Load(server.address, questions, CONNECTIONS) as load:
                tally = load.open(rate, wanted.stretch, seed=index)
                spent_s = cpu_s(server.pids()) - before_s
            minutes = (index + 1) * wanted.stretch / 60
            stretches.append(measured(server, tally, wanted.stretch, minutes, spent_s))
            told = stretches[-1]
            progress.print(
                f"{told.minutes:5.1f} min  {told.goodput:,.0f}/s  p99 {told.p99_ms:.2f} ms  PSS {told.pss_mb:.1f} MB  "
                f"{told.files} files  {told.errors} errors"
            )
    found = {
        "contender": wanted.only,
        "machine": machine,
        "peak": peak,
        "rate": rate,
        "stretches": [asdict(stretch) for stretch in stretches],
        "trends": trends(stretches),
    }
    if wanted.json:
        wanted.json.write_text(json.dumps(found, indent=1) + "\n")
    if wanted.plot:
        draw(stretches, wanted.plot)
    show(found, stretches)
    return int(any(stretch.errors for stretch in stretches))


def show(found: dict[str, Any], stretches: Sequence[Stretch]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    title = f"{found['contender']}: {found['rate']:,.0f} requests a second, of at most {found['peak']:,.0f}"
    table = Table(*(field.name for field in fields(Stretch)), title=title)
    for stretch in stretches[:: max(1, len(stretches) // 12)]:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" for value in astuple(stretch)))
    console.print(table)
    for name, change in found["trends"].items():
        console.print(f"{name}: {change:+.2f} from the begin to the end, by the line that fits best")


def draw(stretches: Sequence[Stretch], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = {"PSS (MB)": "pss_mb", "p99 (ms)": "p99_ms", "open files": "files"}
    for axes, (label, name) in zip(figure.subplots(len(panels), 1, sharex=True), panels.items(), strict=True):
        axes.plot([stretch.minutes for stretch in stretches], [getattr(stretch, name) for stretch in stretches])
        axes.set(ylabel=label, ylim=(0, 1.1 * max(getattr(stretch, name) for stretch in stretches)))
        axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="minutes")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
