"""Families: metrics in Prometheus's data model, and the merge over several processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from actserve.telemetry.meters import Histogram

Labels = tuple[tuple[str, str], ...]


class Merge(StrEnum):
    """How samples with equal labels of several processes are merged."""

    TOTAL = "total"  # sum over all processes, ended ones too
    SUM = "sum"  # sum over running processes
    MAX = "max"  # maximum over running processes, which all observe the same value


@dataclass
class Family:
    """One metric. `samples` are by name and labels; a sample's name is the family's, with or without a suffix."""

    name: str
    help: str
    kind: str  # counter, gauge or histogram
    merge: Merge
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def add(self, labels: Mapping[str, object], value: float, suffix: str = "") -> None:
        """Add `value` to the sample with these labels."""
        key = (self.name + suffix, tuple((name, str(label)) for name, label in labels.items()))
        self.samples[key] = self.samples.get(key, 0) + value

    def add_histogram(self, labels: Mapping[str, object], histogram: Histogram, unit: float = 1) -> None:
        """`unit` converts the histogram's values to the family's unit."""
        cumulative = 0
        bounds = [*(repr(bound * unit) for bound in histogram.bounds), "+Inf"]
        for bound, count in zip(bounds, histogram.counts, strict=True):
            cumulative += count
            self.add({**labels, "le": bound}, cumulative, "_bucket")
        self.add(labels, cumulative, "_count")
        self.add(labels, histogram.total * unit, "_sum")

    def merge_from(self, other: Family) -> None:
        for key, value in other.samples.items():
            own = self.samples.get(key, 0)
            self.samples[key] = max(own, value) if self.merge == Merge.MAX else own + value


Families = dict[str, Family]


def merged(running: Iterable[Families], ended: Iterable[Families]) -> Families:
    """The families of all processes; of `ended` ones only the totals."""
    result: Families = {}
    for families in (*running, *map(totals, ended)):
        for family in families.values():
            empty = Family(family.name, family.help, family.kind, family.merge)
            result.setdefault(family.name, empty).merge_from(family)
    return result


def totals(families: Families) -> Families:
    return {name: family for name, family in families.items() if family.merge == Merge.TOTAL}


def to_jsonable(families: Families) -> list[Any]:
    return [
        [f.name, f.help, f.kind, f.merge, [[name, labels, value] for (name, labels), value in f.samples.items()]]
        for f in families.values()
    ]


def from_jsonable(document: list[Any]) -> Families:
    """The inverse of `to_jsonable`."""
    families: Families = {}
    for name, help_, kind, merge, samples in document:
        by_key = {(sample, tuple((k, v) for k, v in labels)): value for sample, labels, value in samples}
        families[name] = Family(name, help_, kind, Merge(merge), by_key)
    return families
