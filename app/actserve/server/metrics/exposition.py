"""Families -> the text that Prometheus scrapes, with prometheus_client."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from actserve.telemetry.families import Families


class _FamiliesCollector(Collector):
    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families.values():
            metric = Metric(family.name, family.help, family.kind)
            for (name, labels), value in family.samples.items():
                metric.add_sample(name, dict(labels), value)
            yield metric


def expose(families: Families, accept: str) -> tuple[bytes, str]:
    """(text, content type): the format of Prometheus, or OpenMetrics if `accept` asks for it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_FamiliesCollector(families))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
