"""Families: metrics in the model of Prometheus, and how those of several processes become one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from actserve.telemetry.meters import Histogram

Labels = tuple[tuple[str, str], ...]


class Merge(StrEnum):
    """What becomes of the samples of several processes that have the same labels."""

    TOTAL = "total"  # their sum; what a process counted stays when it ends
    SUM = "sum"  # their sum, of the living
    MAX = "max"  # of the living, who all see the same


@dataclass
class Family:
    """One metric. `samples`: by their name, which is the family's or has a suffix, and their labels."""

    name: str
    help: str
    kind: str  # Prometheus's: counter, gauge, histogram
    merge: Merge
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def add(self, labels: Mapping[str, object], value: float, suffix: str = "") -> None:
        """To what there is with these labels."""
        key = (self.name + suffix, tuple((name, str(label)) for name, label in labels.items()))
        self.samples[key] = self.samples.get(key, 0) + value

    def add_histogram(self, labels: Mapping[str, object], histogram: Histogram, unit: float = 1) -> None:
        """`unit`: what one of the histogram's is, in the family's."""
        count = 0
        bounds = [*(repr(bound * unit) for bound in histogram.bounds), "+Inf"]
        for bound, more in zip(bounds, histogram.counts, strict=True):
            count += more
            self.add({**labels, "le": bound}, count, "_bucket")
        self.add(labels, count, "_count")
        self.add(labels, histogram.total * unit, "_sum")

    def take_in(self, other: Family) -> None:
        for key, value in other.samples.items():
            mine = self.samples.get(key, 0)
            self.samples[key] = max(mine, value) if self.merge == Merge.MAX else mine + value


Families = dict[str, Family]


def merged(living: Iterable[Families], gone: Iterable[Families]) -> Families:
    """Those of all processes; of those `gone` what they counted."""
    found: Families = {}
    for families in living:
        _take_in(found, families.values())
    for families in gone:
        _take_in(found, totals(families).values())
    return found


def totals(families: Families) -> Families:
    return {name: family for name, family in families.items() if family.merge == Merge.TOTAL}


def _take_in(found: Families, families: Iterable[Family]) -> None:
    for family in families:
        found.setdefault(family.name, Family(family.name, family.help, family.kind, family.merge)).take_in(family)


def to_jsonable(families: Families) -> list[Any]:
    return [
        [f.name, f.help, f.kind, f.merge, [[name, labels, value] for (name, labels), value in f.samples.items()]]
        for f in families.values()
    ]


def from_jsonable(document: list[Any]) -> Families:
    """What `to_jsonable` gave."""
    found: Families = {}
    for name, help_, kind, merge, samples in document:
        by_key = {(sample, tuple((k, v) for k, v in labels)): value for sample, labels, value in samples}
        found[name] = Family(name, help_, kind, Merge(merge), by_key)
    return found
