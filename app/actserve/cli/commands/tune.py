"""`actserve tune`: measure an artifact's programs on this host."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from actserve.cli.stores import DEFAULT_STORE, Label, Store, TrustOption, find, open_for_reading
from actserve.cli.terminal import Json, console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from actserve.engine.tuning import Tuning
    from actserve.engine.tuning.tuned import Tuned

MIN_NS_PER_BATCH_SIZE = 200_000_000  # measuring time
BAR_WIDTH = 24  # characters


def tune(
    label: Label,
    store: Store = DEFAULT_STORE,
    trust: TrustOption = None,
    json: Json = False,
) -> None:
    """Measure an artifact's programs at several batch sizes. `serve` uses the result to choose its program."""
    from rich.console import Console

    from actserve.engine.tuning.tuned import Tuned

    artifact = find(open_for_reading(store, trust), label)
    with console().status(f"measuring {artifact.label}"):
        tuned, failed = Tuned.measure(artifact, MIN_NS_PER_BATCH_SIZE)
    for runtime, reason in failed.items():
        console().print(f".{runtime} does not run here: {reason}", soft_wrap=True, markup=False)
    if json:
        print_json(
            {
                "fastest": tuned.fastest,
                "batch": {runtime: tuning.batch for runtime, tuning in tuned.programs.items()},
                "item_us": {runtime: _us(tuning.item_ns) for runtime, tuning in tuned.programs.items()},
                "threads": {
                    runtime: {"count": tuning.threads, "from_items": tuning.wide_from, "item_us": _us(tuning.wide_ns)}
                    for runtime, tuning in tuned.programs.items()
                    if tuning.wide_ns
                },
            }
        )
        tuned.save(artifact)
        return
    out = Console(width=None if sys.stdout.isatty() else 120)
    out.print(curve(tuned))
    for runtime, tuning in tuned.programs.items():
        out.print(f".{runtime}: {threads_of(tuning)}", markup=False, highlight=False, soft_wrap=True)
    file = tuned.save(artifact)
    out.print(f"{artifact.label}: .{tuned.fastest} is the fastest; written to {file.name} beside it", markup=False)
    out.print("A running service uses the result after a restart.")


def threads_of(tuning: Tuning) -> str:
    """How many threads a call takes, and why."""
    if not tuning.wide_ns:
        return "a call takes one thread" + ("; it is quick" if tuning.quick else "")
    if tuning.wide_from is None:
        return f"a call takes one thread; {tuning.threads} are not faster"
    size = tuning.wide_from
    before_ms, after_ms = (size * times[size] / 1e6 for times in (tuning.item_ns, tuning.wide_ns))
    items = f" of {size} items or more" if size > 1 else ""
    return (
        f"a call{items} takes {tuning.threads} threads while no other slow call of the service runs "
        f"({after_ms:.1f} ms), else one ({before_ms:.1f} ms)"
    )


def _us(item_ns: Mapping[int, int]) -> dict[str, float]:
    return {str(size): ns / 1e3 for size, ns in item_ns.items()}


def curve(tuned: Tuned) -> Table:
    """A table of µs per item by batch size, with a star at the batch size that `serve` uses.

    Programs that were measured with all cores have a second column.
    """
    from rich.table import Table

    table = Table("batch size")
    columns = []
    for name, tuning in tuned.programs.items():
        table.add_column(f".{name}, µs per item", no_wrap=True)
        columns.append((tuning, tuning.item_ns))
        if tuning.wide_ns:
            table.add_column(f"{tuning.threads} threads", no_wrap=True)
            columns.append((tuning, tuning.wide_ns))
    slowest = max(ns for _, times in columns for ns in times.values())
    for size in sorted({size for _, times in columns for size in times}):
        cells = []
        for tuning, times in columns:
            ns = times.get(size)
            star = "*" if size == tuning.batch else " "
            cells.append(
                "" if ns is None else f"{ns / 1e3:8,.1f} {star} {'█' * max(1, round(BAR_WIDTH * ns / slowest))}"
            )
        table.add_row(str(size), *cells)
    return table
