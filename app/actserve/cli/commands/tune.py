"""`actserve tune`: measure an artifact's programs on this host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actserve.cli.stores import DEFAULT_STORE, Label, Store, TrustOption, find, open_for_reading
from actserve.cli.terminal import Json, console, print_json

if TYPE_CHECKING:
    from rich.table import Table

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
    file = tuned.save(artifact)
    for runtime, reason in failed.items():
        console().print(f".{runtime} does not run here: {reason}", soft_wrap=True, markup=False)
    if json:
        item_us = {
            runtime: {str(size): ns / 1e3 for size, ns in tuning.item_ns.items()}
            for runtime, tuning in tuned.programs.items()
        }
        batch = {runtime: tuning.batch for runtime, tuning in tuned.programs.items()}
        print_json({"fastest": tuned.fastest, "batch": batch, "item_us": item_us})
        return
    out = Console()
    out.print(curve(tuned))
    out.print(f"{artifact.label}: .{tuned.fastest} is the fastest; written to {file.name} beside it", markup=False)
    out.print("A running service uses the result after a restart.")


def curve(tuned: Tuned) -> Table:
    """A table of µs per item by batch size, with a star at the batch size that `serve` uses."""
    from rich.table import Table

    table = Table("batch size")
    slowest = max(ns for tuning in tuned.programs.values() for ns in tuning.item_ns.values())
    for name in tuned.programs:
        table.add_column(f".{name}, µs per item", no_wrap=True)
    for size in sorted({size for tuning in tuned.programs.values() for size in tuning.item_ns}):
        cells = []
        for tuning in tuned.programs.values():
            ns = tuning.item_ns.get(size)
            star = "*" if size == tuning.batch else " "
            cells.append(
                "" if ns is None else f"{ns / 1e3:8,.1f} {star} {'█' * max(1, round(BAR_WIDTH * ns / slowest))}"
            )
        table.add_row(str(size), *cells)
    return table
