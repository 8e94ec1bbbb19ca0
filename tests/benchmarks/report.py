"""From measurements to tables, ratios and docs. Run: python -m tests.benchmarks.report FILE.json FOLDER"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import machine, plot
from tests.benchmarks.contenders import CONTENDERS

WIDTH = 150  # of the tables, if stdout is no terminal
LIMITED = 0.9  # the load generator's share of its core from which on it may have been the limit
BY_NAME = {contender.name: contender for contender in CONTENDERS}
HEADER = (
    "contender", "µs/action", "× T", "× best peer", "actions/s", "p50 ms", "p99", "p99.9", "RSS MB", "PSS MB", "start s"
)  # fmt: skip
LOOKED_AT = ("actserve", "actserve-int8", "actserve-bf16")

Document = dict[str, Any]  # `cost.Run.found`
Titled = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, header, lines


@dataclass(frozen=True)
class Row:
    """A contender at one number of connections: medians over the rounds."""

    name: str
    connections: int
    cpu_us: float
    cpu_us_range: tuple[float, float]  # the least and the most of any round
    rate: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    rss_mb: float
    pss_mb: float
    generator: float
    errors: tuple[str, ...]  # of any round: a row with one is invalid

    @property
    def title(self) -> str:
        return BY_NAME[self.name].title

    @property
    def is_peer(self) -> bool:
        """It does inference, has no errors, and is not ours."""
        return BY_NAME[self.name].kind in ("hand", "peer") and not self.errors


def rows(found: Document) -> list[Row]:
    """In the order of the contenders."""
    grouped: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for cell in found["cells"]:
        grouped.setdefault((cell["connections"], [*BY_NAME].index(cell["contender"])), []).append(cell)
    return [_row(grouped[key]) for key in sorted(grouped)]


def _row(cells: Sequence[Mapping[str, Any]]) -> Row:
    figures = ("cpu_us", "rate", "p50_ms", "p99_ms", "p999_ms", "rss_mb", "pss_mb", "generator")
    costs = [cell["cpu_us"] for cell in cells]
    return Row(
        name=cells[0]["contender"],
        connections=cells[0]["connections"],
        cpu_us_range=(min(costs), max(costs)),
        errors=tuple(f"{kind}: {count}" for cell in cells for kind, count in cell["errors"].items() if count),
        **{name: median(cell[name] for cell in cells) for name in figures},
    )


def bare(found: Document, program: str, batch: int, figure: str = "cpu_us") -> float:
    """The median over the rounds. JSON has made strings of the batch sizes."""
    return float(median(programs[program][str(batch)][figure] for programs in found["bare"]))


def tables(found: Document) -> Iterable[Titled]:
    all_rows, t_us = rows(found), bare(found, "tutorial", 1)
    named = {"tutorial": "the tutorial's graph", "pong": "actserve's artifact", "pong-int8": "the same in int8"}
    lines = [[named[name], *(f"{bare(found, name, int(b)):.0f}" for b in by)] for name, by in found["bare"][0].items()]
    yield "ONNX Runtime alone, µs per screen; T is the upper left", ["", "batch 1", "8", "32"], lines
    for connections in found["settings"]["connections"]:
        shown = [row for row in all_rows if row.connections == connections]
        best = min((row.cpu_us for row in shown if row.is_peer), default=0.0)
        lines = [_line(row, t_us, best, median(found["starts_s"][row.name])) for row in shown]
        yield f"{connections} connection{'s' * (connections > 1)}", HEADER, lines
    yield "What to look at", ["", *map(str, found["settings"]["connections"])], list(ratios(found, all_rows, t_us))


def _line(row: Row, t_us: float, best: float, start_s: float) -> list[str]:
    if row.errors:
        return [f"{row.title}: INVALID", ", ".join(row.errors)[:200], *[""] * (len(HEADER) - 2)]
    low, high = row.cpu_us_range
    return [
        row.title,
        f"{row.cpu_us:,.0f} ({low:,.0f}–{high:,.0f})",
        f"{row.cpu_us / t_us:.2f}",
        f"{row.cpu_us / best:.2f}" if best else "",
        f"{'≥ ' if row.generator > LIMITED else ''}{row.rate:,.0f}",
        *(f"{latency:.2f}" for latency in (row.p50_ms, row.p99_ms, row.p999_ms)),
        f"{row.rss_mb:.0f}",
        f"{row.pss_mb:.0f}",
        f"{start_s:.2f}",
    ]


def ratios(found: Document, all_rows: Sequence[Row], t_us: float) -> Iterable[list[str]]:
    """A line each, a column for each number of connections."""
    counts = found["settings"]["connections"]
    peers = {count: [row for row in all_rows if row.connections == count and row.is_peer] for count in counts}
    for name in LOOKED_AT:
        ours = {row.connections: row for row in all_rows if row.name == name and not row.errors}
        if not ours:
            continue
        title, program = BY_NAME[name].title, BY_NAME[name].policy
        against = {count: (row, peers[count]) for count, row in ours.items() if peers[count]}
        figures = {
            "CPU an action ÷ T": {count: row.cpu_us / t_us for count, row in ours.items()},
            "CPU an action ÷ the cheapest peer's": {
                count: row.cpu_us / min(peer.cpu_us for peer in others) for count, (row, others) in against.items()
            },
            "actions a second ÷ the fastest peer's": {
                count: row.rate / max(peer.rate for peer in others) for count, (row, others) in against.items()
            },
            "p50 less a bare call at batch 1, ms": {
                count: row.p50_ms - bare(found, program, 1, "p50_us") / 1e3
                for count, row in ours.items()
                if count == 1 and program in found["bare"][0]
            },
        }
        for figure, by in figures.items():
            if by:
                yield [f"{title}: {figure}", *(f"{by[count]:.2f}" if count in by else "" for count in counts)]


def notes(found: Document) -> Iterable[str]:
    """How far to trust it."""
    settings, cells = found["settings"], found["cells"]
    yield machine.sentence(found["machine"])
    rounds = f"{settings['rounds']} rounds of {settings['seconds']:g} s"
    yield f"Medians of {rounds}, all in one run; the parentheses show the lowest and the highest round."
    if cells:
        others = [cell["others"] for cell in cells]
        yield (
            f"Other processes had {median(others):.0%} of one of the two cores during a measurement (median; at most "
            f"{max(others):.0%})."
        )
    if any(row.generator > LIMITED for row in rows(found)):
        yield "≥: the load generator's core was busy; the server could have answered more."
    for name, why in found["left_out"].items():
        yield f"Left out: {BY_NAME[name].title}, {why.splitlines()[0]}."


def show(found: Document) -> int:
    """On stdout. The exit code: 1 if a row is invalid or a server failed."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for title, header, lines in tables(found):
        table = Table(header[0], title=title, title_justify="left")
        for name in header[1:]:
            table.add_column(name, justify="right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for note in notes(found):
        console.print(note, highlight=False, markup=False)
    return int(any(row.errors for row in rows(found)) or bool(found["left_out"]))


def write(found: Document, folder: Path) -> None:
    """cost.md and cost.png."""
    parts = [INTRODUCTION, *(f"{note}\n" for note in notes(found))]
    parts += [f"## {title}\n\n{markdown(header, lines)}" for title, header, lines in tables(found)]
    (folder / "cost.md").write_text("\n".join(parts))
    plot.draw(rows(found), bare(found, "tutorial", 1), folder / "cost.png")


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    head, *body = (f"| {' | '.join(cells)} |" for cells in escaped)
    return "\n".join([head, f"|---|{'---:|' * (len(header) - 1)}", *body]) + "\n"


INTRODUCTION = """\
# What an action costs

Written by `make bench` (`python -m tests.benchmarks.cost --docs docs`); do not edit.

![CPU per action](cost.png)

Every server runs the same policy: the same `.onnx` in the same ONNX Runtime with one thread. The server and its child
processes use one core, the load generator another. Each connection sends its next request as soon as it has its answer.
Every answer is compared with the action of the bare program for that screen. One wrong answer or one error makes a row
invalid. µs/action is the CPU time, user and system, of all processes of the server. **T** is the tutorial's own call:
no server, its graph in process, one screen at a time, one thread.

Each peer is a short script in `tests/benchmarks/peers`. `tests/benchmarks/contenders.py` starts the peers and sends the
requests. If you know better settings for one core, please open an issue.
"""

if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
