"""One policy's families in a few numbers."""

from __future__ import annotations

import math
from typing import Any

from actserve.telemetry.families import Families

_MS = 1000  # of a second


def summary(families: Families, policy: str) -> dict[str, Any]:
    """JSON-able: see `GET /policies/{name}/stats`."""
    sizes = _buckets(families, "actserve_batch_size", policy)
    actions = _sum(families, "actserve_actions", "_total", policy)
    calls = _sum(families, "actserve_batch_size", "_count", policy)
    return {
        "requests": _sum(families, "actserve_requests", "_total", policy),
        "actions": actions,
        "refused": _sum(families, "actserve_refused", "_total", policy),
        "rate": round(_sum(families, "actserve_actions_per_second", "", policy), 3),
        "batch_size": {
            "mean": round(actions / calls, 3) if calls else None,
            "buckets": {_bound(le): count for le, count in _apart(sizes).items() if count},
        },
        "queue_ms": _percentiles(_buckets(families, "actserve_queue_seconds", policy)),
        "inference_ms": _percentiles(_buckets(families, "actserve_inference_seconds", policy)),
    }


def quantile(buckets: dict[float, float], q: float) -> float | None:
    """Of a histogram, as Prometheus's `histogram_quantile` has it; None if it is empty.

    `buckets`: by upper bound, ascending to infinity, how many are at most that. Within a bucket they are taken to be
    spread evenly; what is above the last finite bound is taken to be there.
    """
    rank = q * buckets[math.inf]
    if not rank:
        return None
    low, below = 0.0, 0.0
    for bound, count in buckets.items():
        if count >= rank:
            return low if bound == math.inf else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    raise AssertionError("the last bucket has all")


def _percentiles(buckets: dict[float, float]) -> dict[str, float | None]:
    found = {"p50": quantile(buckets, 0.5), "p99": quantile(buckets, 0.99)}
    return {name: None if value is None else round(value * _MS, 3) for name, value in found.items()}


def _buckets(families: Families, family: str, policy: str) -> dict[float, float]:
    """Of all versions and runtimes, by upper bound, cumulative."""
    found: dict[float, float] = {math.inf: 0}
    for (name, labels), value in families[family].samples.items():
        given = dict(labels)
        if name == family + "_bucket" and given["policy"] == policy:
            bound = float(given["le"])
            found[bound] = found.get(bound, 0) + value
    return dict(sorted(found.items()))


def _apart(buckets: dict[float, float]) -> dict[float, float]:
    """Not cumulative."""
    before = [0, *buckets.values()]
    return {bound: count - less for (bound, count), less in zip(buckets.items(), before, strict=False)}


def _bound(bound: float) -> str:
    return "more" if bound == math.inf else f"{bound:g}"


def _sum(families: Families, family: str, suffix: str, policy: str) -> float:
    return sum(
        value
        for (name, labels), value in families[family].samples.items()
        if name == family + suffix and ("policy", policy) in labels
    )
