"""The main numbers of one policy, computed from its families."""

from __future__ import annotations

import math
from typing import Any

from actserve.telemetry.families import Families

_MS_PER_S = 1000


def summary(families: Families, policy: str) -> dict[str, Any]:
    """The body of `GET /policies/{name}/stats`."""
    sizes = _buckets(families, "actserve_batch_size", policy)
    actions = _sum(families, "actserve_actions", "_total", policy)
    calls = _sum(families, "actserve_batch_size", "_count", policy)
    return {
        "requests": _sum(families, "actserve_requests", "_total", policy),
        "actions": actions,
        "refused": _sum(families, "actserve_refused", "_total", policy),
        **({"limited": limited} if (limited := _by_reason(families, policy)) else {}),
        "rate": round(_sum(families, "actserve_actions_per_second", "", policy), 3),
        "batch_size": {
            "mean": round(actions / calls, 3) if calls else None,
            "buckets": {_bound(le): count for le, count in _differences(sizes).items() if count},
        },
        "queue_ms": _percentiles(_buckets(families, "actserve_queue_seconds", policy)),
        "inference_ms": _percentiles(_buckets(families, "actserve_inference_seconds", policy)),
    }


def quantile(buckets: dict[float, float], q: float) -> float | None:
    """The quantile of a histogram, computed as Prometheus's `histogram_quantile` does; None if it is empty.

    `buckets` are cumulative counts by upper bound, ascending to infinity. Values are assumed to be spread evenly within
    a bucket. Values above the last finite bound count as that bound.
    """
    rank = q * buckets[math.inf]
    if not rank:
        return None
    low, below = 0.0, 0.0
    for bound, count in buckets.items():
        if count >= rank:
            return low if bound == math.inf else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    raise AssertionError("the last bucket counts all values")


def _percentiles(buckets: dict[float, float]) -> dict[str, float | None]:
    quantiles = {"p50": quantile(buckets, 0.5), "p99": quantile(buckets, 0.99)}
    return {name: None if value is None else round(value * _MS_PER_S, 3) for name, value in quantiles.items()}


def _buckets(families: Families, family: str, policy: str) -> dict[float, float]:
    """Cumulative counts by upper bound, over all versions and runtimes."""
    buckets: dict[float, float] = {math.inf: 0}
    for (name, labels), value in families[family].samples.items():
        by_name = dict(labels)
        if name == family + "_bucket" and by_name["policy"] == policy:
            bound = float(by_name["le"])
            buckets[bound] = buckets.get(bound, 0) + value
    return dict(sorted(buckets.items()))


def _differences(buckets: dict[float, float]) -> dict[float, float]:
    """Cumulative counts -> the count of each bucket."""
    before = [0, *buckets.values()]
    return {bound: count - below for (bound, count), below in zip(buckets.items(), before, strict=False)}


def _bound(bound: float) -> str:
    return "more" if bound == math.inf else f"{bound:g}"


def _by_reason(families: Families, policy: str) -> dict[str, float]:
    """The items that the limits changed, by reason; empty for a policy without limits."""
    found: dict[str, float] = {}
    for (_, labels), value in families["actserve_limited"].samples.items():
        by_name = dict(labels)
        if by_name["policy"] == policy:
            found[by_name["reason"]] = found.get(by_name["reason"], 0) + value
    return found


def _sum(families: Families, family: str, suffix: str, policy: str) -> float:
    return sum(
        value
        for (name, labels), value in families[family].samples.items()
        if name == family + suffix and ("policy", policy) in labels
    )
