"""What a load generator saw: latencies, errors by kind, and whether the same question always got the same answer."""

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
# Batch mates may change the last digits of a continuous action; a discrete one must not change at all.
RELATIVE, ABSOLUTE = 1e-3, 1e-4

Read = Callable[[bytes], Mapping[str, Any]]  # an answer's outputs by name; raises ValueError or InvalidRequest


class LoadTally:
    """Counts good answers (with their latency) and errors. Tallies of several processes add up.

    `read` takes answers apart that are not the same byte for byte; by default they are JSON.
    """

    def __init__(self, read: Read = pydantic_core.from_json) -> None:
        self._read = read
        self.errors: Counter[str] = Counter()
        self._histogram = HdrHistogram(1, HIGHEST_US, 3)  # microseconds, three significant digits
        self._answers: dict[int, set[bytes]] = {}  # by question; the members of a set say the same

    @property
    def requests(self) -> int:
        """Good answers."""
        return int(self._histogram.get_total_count())

    def answer(self, question: int, status: int, body: bytes, latency_us: int) -> bool:
        """Count one answer; whether it was good. Only then its latency counts: an error that comes fast is no speed."""
        if status != 200:
            self.errors[f"http_{status}{_error_code(body)}"] += 1
        elif not self._consistent(question, body):
            self.errors["inconsistent"] += 1
        else:
            self._histogram.record_value(min(max(latency_us, 1), HIGHEST_US))
            return True
        return False

    def unopened(self, error: OSError | ServiceError) -> None:
        """Count a connection that could not be opened, or was refused."""
        kind = f"http_{error.status}:{error.reason}" if isinstance(error, ServiceError) else "connection"
        self.errors[kind] += 1

    def latency_ms(self) -> dict[str, float]:
        """p50, p90, p99, p999 and max; all 0 when there was no good answer."""
        if not self.requests:
            return dict.fromkeys(PERCENTILES, 0.0)
        found = self._histogram.get_percentile_to_value_dict(list(PERCENTILES.values()))
        return {name: found[percentile] / 1000 for name, percentile in PERCENTILES.items()}

    def add(self, other: Self) -> None:
        """Add another process's tally to this one. Questions that the two got different answers to are inconsistent."""
        self.errors.update(other.errors)
        self._histogram.add(other._histogram)
        for question, bodies in other._answers.items():
            if not self._consistent(question, next(iter(bodies))):
                self.errors["inconsistent"] += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "errors": dict(self.errors),
            "histogram": self._histogram.encode().decode(),
            "answers": {question: next(iter(bodies)).decode("latin-1") for question, bodies in self._answers.items()},
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        tally = cls()
        tally.errors.update(document["errors"])
        tally._histogram.decode_and_add(document["histogram"].encode())
        tally._answers = {int(question): {body.encode("latin-1")} for question, body in document["answers"].items()}
        return tally

    def _consistent(self, question: int, body: bytes) -> bool:
        known = self._answers.setdefault(question, {body})
        if body in known:
            return True
        if not self._agree(next(iter(known)), body):
            return False
        if len(known) < 1000:  # remembered, so that the same digits need not be compared again
            known.add(body)
        return True

    def _agree(self, one: bytes, other: bytes) -> bool:
        """Whether two answers give the same outputs."""
        try:
            first, second = self._read(one), self._read(other)
            return first.keys() == second.keys() and all(_close(first[name], second[name]) for name in first)
        except (AttributeError, KeyError, TypeError, ValueError, InvalidRequest):
            return False


def _close(one: object, other: object) -> bool:
    first, second = np.asarray(one), np.asarray(other)
    if first.shape != second.shape or "f" not in (first.dtype.kind, second.dtype.kind):
        return np.array_equal(first, second)
    return np.allclose(first, second, rtol=RELATIVE, atol=ABSOLUTE)


def _error_code(body: bytes) -> str:
    """`:overloaded`; nothing where the Open Inference Protocol's errors have no code."""
    try:
        error = pydantic_core.from_json(body)["error"]
        return "" if isinstance(error, str) else f":{error['code']}"
    except (KeyError, TypeError, ValueError):
        return ":unknown"
