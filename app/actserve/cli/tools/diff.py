"""Compares two artifacts: their signatures, their actions on both sets of golden samples, and their speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actserve.cli.tools.programs import open_best
from actserve.core.signature import Array, Arrays, Signature
from actserve.engine import golden
from actserve.engine.runtimes.base import Runtime
from actserve.store.artifact import Artifact

BATCHES = (1, 8)
ROUNDS = 15
CALLS = 20  # per round and program


@dataclass(frozen=True)
class Change:
    """A tensor of the signature that was added, removed or changed."""

    way: str  # "takes" or "gives"
    name: str
    before: str | None  # None: it was added
    after: str | None  # None: it was removed


@dataclass(frozen=True)
class ActionAgreement:
    """The actions of both programs, compared on the same observations."""

    samples: int
    same: int  # items with the same action; continuous actions within the tolerance of certificates
    largest_difference: dict[str, float]  # of each floating-point output that both programs have
    of: str = "golden samples"  # what the samples are: the golden samples of both artifacts, or recorded steps


Compare = Callable[[Runtime, Runtime], ActionAgreement]


@dataclass(frozen=True)
class Side:
    """One of the two artifacts, and its speed on this host."""

    label: str
    runtime: str | None  # the best program that this host can run; None: it can run none
    reason: str  # why this program, or why none
    files: dict[str, int]  # size in bytes by name
    median_us: dict[int, float]  # microseconds per item, by batch size

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"median_us": {str(size): value for size, value in self.median_us.items()}}


@dataclass(frozen=True)
class Diff:
    before: Side
    after: Side
    signature: tuple[Change, ...]
    agreement: ActionAgreement | None  # None: their inputs differ, or one cannot run here

    def as_json(self) -> dict[str, Any]:
        """The object that `actserve diff --json` prints."""
        return {
            "before": self.before.as_json(),
            "after": self.after.as_json(),
            "signature": [asdict(change) for change in self.signature],
            "agreement": asdict(self.agreement) if self.agreement else None,
        }


def diff(before: Artifact, after: Artifact, compare: Compare | None = None) -> Diff:
    """Compare two artifacts. `compare` compares the actions; None: on the golden samples. Raises a `StoreError`.

    Takes about a second for small policies. The programs are timed in turns, so that other load affects both.
    """
    artifacts = [before, after]
    samples = [golden.read(artifact)[0] for artifact in artifacts]
    opened = [open_best(artifact) for artifact in artifacts]
    runtimes = [runtime for runtime, _ in opened]
    try:
        medians = _time_in_turns(runtimes, samples)
        agreement = _agreement(runtimes, samples) if compare is None else _compare(runtimes, compare)
    finally:
        for runtime in runtimes:
            if runtime is not None:
                runtime.close()
    sides = [
        Side(artifact.label, choice.runtime if choice else None, reason, _sizes(artifact), median)
        for artifact, (_, (choice, reason)), median in zip(artifacts, opened, medians, strict=True)
    ]
    changes = _changes(before.manifest.signature, after.manifest.signature)
    return Diff(sides[0], sides[1], tuple(changes), agreement)


def show(found: Diff, console: Console) -> None:
    """Print the comparison as text."""
    before, after = found.before, found.after
    console.print(f"{before.label} -> {after.label}", highlight=False)
    for change in found.signature:
        was, is_now = change.before or "nothing", change.after or "nothing"
        console.print(f"  {change.way}  {change.name}: {was} -> {is_now}", highlight=False, markup=False)
    if not found.signature:
        console.print("  the same signature")
    if found.agreement is None:
        console.print("  actions not compared: the inputs differ, or one artifact cannot run here")
    else:
        share = found.agreement.same / max(1, found.agreement.samples)
        differences = ", ".join(f"{k} by up to {v:.3g}" for k, v in found.agreement.largest_difference.items())
        console.print(
            f"  the same action on {found.agreement.same} of {found.agreement.samples} {found.agreement.of} "
            f"({share:.1%})" + (f"; {differences}" if differences else ""),
            highlight=False,
        )
    table = Table("", before.label, after.label, "ratio")
    table.add_row("runtime", *(f".{side.runtime}" if side.runtime else side.reason for side in (before, after)), "")
    for size in sorted(before.median_us.keys() | after.median_us.keys()):
        table.add_row(f"µs per item, batch {size}", *_compared(before.median_us.get(size), after.median_us.get(size)))
    for name in sorted(before.files.keys() | after.files.keys()):
        table.add_row(f"{name}, bytes", *_compared(before.files.get(name), after.files.get(name)))
    console.print(table)


def _compared(before: float | None, after: float | None) -> tuple[str, str, str]:
    shown = tuple(
        "-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in (before, after)
    )
    return shown[0], shown[1], f"{after / before:.2f}x" if before and after else ""


def _changes(before: Signature, after: Signature) -> list[Change]:
    changes: list[Change] = []
    for way, old, new in (("takes", before.inputs, after.inputs), ("gives", before.results, after.results)):
        was, is_now = ({spec.name: str(spec) for spec in specs} for specs in (old, new))
        for name in [*was, *(name for name in is_now if name not in was)]:
            if was.get(name) != is_now.get(name):
                changes.append(Change(way, name, was.get(name), is_now.get(name)))
    if before.max_batch != after.max_batch:
        changes.append(Change("takes", "max_batch", str(before.max_batch), str(after.max_batch)))
    return changes


def _sizes(artifact: Artifact) -> dict[str, int]:
    return {name: record.bytes for name, record in artifact.manifest.files.items()}


def _compare(runtimes: list[Runtime | None], compare: Compare) -> ActionAgreement | None:
    first, second = runtimes
    if first is None or second is None or str(first.signature.action) != str(second.signature.action):
        return None
    return compare(first, second)


def _agreement(runtimes: list[Runtime | None], samples: list[Arrays]) -> ActionAgreement | None:
    first, second = runtimes
    if first is None or second is None:
        return None
    takes = [[(spec.name, str(spec)) for spec in runtime.signature.inputs] for runtime in (first, second)]
    if sorted(takes[0]) != sorted(takes[1]) or str(first.signature.action) != str(second.signature.action):
        return None
    union = _union(samples)
    size = min(8, first.signature.max_batch, second.signature.max_batch)
    ours, theirs = (golden.in_batches(runtime.run, union, size) for runtime in (first, second))
    a, b = ours[first.signature.action.name], theirs[second.signature.action.name]
    same = int(golden.agreeing(a, b, golden.Tolerance().of(first.signature.action)).sum())
    largest = {
        name: float(np.max(np.abs(ours[name] - theirs[name]), initial=0.0))
        for name in ours.keys() & theirs.keys()
        if ours[name].dtype.kind == "f" and ours[name].shape == theirs[name].shape
    }
    return ActionAgreement(len(a), same, dict(sorted(largest.items())))


def _union(samples: list[Arrays]) -> Arrays:
    """The golden samples of both artifacts, without duplicates."""
    joined = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    items: dict[bytes, int] = {}
    for number in range(len(next(iter(joined.values())))):
        items.setdefault(b"".join(array[number].tobytes() for array in joined.values()), number)
    chosen = list(items.values())
    return {name: array[chosen] for name, array in joined.items()}


def _time_in_turns(runtimes: list[Runtime | None], samples: list[Arrays]) -> list[dict[int, float]]:
    """The median microseconds per item of each runtime on its own samples, by batch size. Timed in turns."""
    medians: list[dict[int, float]] = [{} for _ in runtimes]
    for size in BATCHES:
        calls: dict[int, Callable[[], Any]] = {}
        for number, (runtime, inputs) in enumerate(zip(runtimes, samples, strict=True)):
            if runtime is not None and size <= runtime.signature.max_batch:
                calls[number] = _call(runtime, {name: _repeat(array, size) for name, array in inputs.items()})
        times: dict[int, list[float]] = {number: [] for number in calls}
        for _ in range(ROUNDS):
            for number, call in calls.items():
                times[number] += [_timed(call) for _ in range(CALLS)]
        for number, seconds in times.items():
            medians[number][size] = statistics.median(seconds) * 1e6 / size
    return medians


def _call(runtime: Runtime, batch: Arrays) -> Callable[[], Any]:
    return lambda: runtime.run(batch)


def _timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _repeat(array: Array, size: int) -> Array:
    """The first `size` items; starts again at the first if there are fewer."""
    return np.ascontiguousarray(array[np.arange(size) % len(array)])
