"""A clock that a test moves, for code that takes a clock."""

from __future__ import annotations


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self, now_s: float = 1_800_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s
