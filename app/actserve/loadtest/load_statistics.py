"""The statistics of a load test: latencies, errors by kind, and whether equal requests got equal answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import pydantic_core
from hdrh.histogram import HdrHistogram

from actserve.core.errors import InvalidRequest, ServiceError

HIGHEST_US = 60_000_000
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}
# The other items of a batch may change the last digits of a continuous action, but never a discrete one.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-3, 1e-4

DecodeAnswer = Callable[[bytes], Mapping[str, Any]]  # body -> outputs by name; raises ValueError or InvalidRequest


class LoadStatistics:
    """Counts good answers, with their latency, and errors. `merge` adds the statistics of another process.

    `decode` reads answers whose bytes differ, to compare their outputs; by default they are JSON.
    """

    def __init__(self, decode: DecodeAnswer = pydantic_core.from_json) -> None:
        self._decode = decode
        self.errors: Counter[str] = Counter()
        self._histogram = HdrHistogram(1, HIGHEST_US, 3)  # microseconds, three significant digits
        self._answers: dict[int, set[bytes]] = {}  # by request key; the bodies in a set have equal outputs

    @property
    def requests(self) -> int:
        """The number of good answers."""
        return int(self._histogram.get_total_count())

    def record_answer(self, request_key: int, status: int, body: bytes, latency_us: int) -> bool:
        """Count one answer and return whether it was good. The latency of an error does not count."""
        if status != 200:
            self.errors[f"http_{status}{_error_code(body)}"] += 1
        elif not self._consistent(request_key, body):
            self.errors["inconsistent"] += 1
        else:
            self._histogram.record_value(min(max(latency_us, 1), HIGHEST_US))
            return True
        return False

    def record_failed_open(self, error: OSError | ServiceError) -> None:
        """Count a connection that could not be opened or was refused."""
        kind = f"http_{error.status}:{error.reason}" if isinstance(error, ServiceError) else "connection"
        self.errors[kind] += 1

    def latency_ms(self) -> dict[str, float]:
        """p50, p90, p99, p999 and max, in milliseconds; all 0 without a good answer."""
        if not self.requests:
            return dict.fromkeys(PERCENTILES, 0.0)
        found = self._histogram.get_percentile_to_value_dict(list(PERCENTILES.values()))
        return {name: found[percentile] / 1000 for name, percentile in PERCENTILES.items()}

    def merge(self, other: Self) -> None:
        """Add the statistics of another process. Equal requests with different answers count as inconsistent."""
        self.errors.update(other.errors)
        self._histogram.add(other._histogram)
        for request_key, bodies in other._answers.items():
            if not self._consistent(request_key, next(iter(bodies))):
                self.errors["inconsistent"] += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "errors": dict(self.errors),
            "histogram": self._histogram.encode().decode(),
            "answers": {key: next(iter(bodies)).decode("latin-1") for key, bodies in self._answers.items()},
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        statistics = cls()
        statistics.errors.update(document["errors"])
        statistics._histogram.decode_and_add(document["histogram"].encode())
        statistics._answers = {int(key): {body.encode("latin-1")} for key, body in document["answers"].items()}
        return statistics

    def _consistent(self, request_key: int, body: bytes) -> bool:
        """Whether `body` has the outputs of the earlier answers to requests with this key."""
        known = self._answers.setdefault(request_key, {body})
        if body in known:
            return True
        if not self._agree(next(iter(known)), body):
            return False
        if len(known) < 1000:  # a cache: the same bytes need no second comparison
            known.add(body)
        return True

    def _agree(self, one: bytes, other: bytes) -> bool:
        """Whether two answers have the same outputs, within the tolerances."""
        try:
            first, second = self._decode(one), self._decode(other)
            return first.keys() == second.keys() and all(_close(first[name], second[name]) for name in first)
        except (AttributeError, KeyError, TypeError, ValueError, InvalidRequest):
            return False


def _close(one: object, other: object) -> bool:
    first, second = np.asarray(one), np.asarray(other)
    if first.shape != second.shape or "f" not in (first.dtype.kind, second.dtype.kind):
        return np.array_equal(first, second)
    return np.allclose(first, second, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE)


def _error_code(body: bytes) -> str:
    """The error's code, such as `:overloaded`. "" for the Open Inference Protocol, whose errors have no code."""
    try:
        error = pydantic_core.from_json(body)["error"]
        return "" if isinstance(error, str) else f":{error['code']}"
    except (KeyError, TypeError, ValueError):
        return ":unknown"
