"""Counts of the infer requests to this process, over HTTP and gRPC, as in Triton's statistics extension."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from actserve.engine.policy import Acted, Policy
from actserve.engine.registry import Registry


@dataclass
class Duration:
    count: int = 0
    ns: int = 0  # total

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns


@dataclass
class Counters:
    """Infer requests to one policy. The time of a success is the sum of its four parts.

    The time of a batch counts for each request in it.
    """

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)  # decoding, and the rest of the time
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)  # encoding
    last_ms: int = 0  # time of the last success, since the epoch

    def succeeded(self, total_ns: int, acted: Acted, output_ns: int) -> None:
        self.success.add(total_ns)
        self.queue.add(acted.queue_ns)
        self.compute_infer.add(acted.run_ns)
        self.compute_output.add(output_ns)
        self.compute_input.add(total_ns - acted.queue_ns - acted.run_ns - output_ns)
        self.last_ms = time.time_ns() // 1_000_000


_counters: WeakKeyDictionary[Policy, Counters] = WeakKeyDictionary()


def counters_of(policy: Policy) -> Counters:
    return _counters.setdefault(policy, Counters())


def describe(policy: Policy) -> dict[str, Any]:
    """An entry of `model_stats`. `inference_count` (items) and `execution_count` (runtime calls) include all routes."""
    inference_stats = asdict(counters_of(policy))
    last_ms = inference_stats.pop("last_ms")
    batches = policy.statistics()
    return {
        "name": policy.name,
        "version": str(policy.version),
        "last_inference": last_ms,
        "inference_count": batches.items,
        "execution_count": batches.batches,
        "inference_stats": inference_stats,
        "batch_stats": [],
    }


def describe_live(registry: Registry) -> list[dict[str, Any]]:
    """The `model_stats` of the live version of every policy."""
    return [describe(policy) for policy in sorted(registry.live, key=lambda policy: policy.name)]
