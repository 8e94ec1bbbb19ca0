"""CPU per action by contender, as horizontal bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.contenders import CONTENDERS, Kind

if TYPE_CHECKING:
    from tests.benchmarks.report import Row

COLOURS: dict[Kind, str] = {"ours": "#2f6f8f", "peer": "#c8553d", "hand": "#e3a18f", "floor": "#b8b8b8"}
LEGEND: dict[Kind, str] = {"ours": "actserve", "peer": "serving frameworks", "hand": "by hand", "floor": "no inference"}
KINDS = {contender.name: contender.kind for contender in CONTENDERS}
MOST = 5  # times T; longer bars are cut


def draw(rows: Sequence[Row], t_us: float, target: Path) -> None:
    """A panel for one connection and one for the most, the cheapest at the bottom, a line at T."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    counts = {row.connections for row in rows}
    shown = sorted({min(counts), max(counts)})
    panels = [[row for row in rows if row.connections == count and not row.errors] for count in shown]
    figure = Figure(figsize=(6.5 * len(panels), 2.0 + 0.3 * max(map(len, panels))), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, sorted(panel, key=lambda row: row.cpu_us), t_us)
    handles = [Patch(color=COLOURS[kind], label=label) for kind, label in LEGEND.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(target, dpi=110)


def _panel(axes: Any, rows: Sequence[Row], t_us: float) -> None:
    end = MOST * t_us
    values = [min(row.cpu_us, end) for row in rows]
    bars = axes.barh([row.title for row in rows], values, color=[COLOURS[KINDS[row.name]] for row in rows])
    axes.bar_label(bars, [f"{row.cpu_us:,.0f}{' →' * (row.cpu_us > end)}" for row in rows], padding=4, fontsize=9)
    axes.axvline(t_us, color="#333333", linewidth=1)
    axes.annotate("T", (t_us, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points")
    axes.set(xlabel="server CPU per action (µs)", xlim=(0, end * 1.12))
    axes.set_title("".join({f"{row.connections} connection{'s' * (row.connections > 1)}" for row in rows}), pad=18)
    axes.spines[["top", "right"]].set_visible(False)
