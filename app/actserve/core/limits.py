"""Limits: the bounds that a policy's programs keep, whatever they are given.

They are nodes of the programs, so that every runtime obeys them, also off the server. One more output of the programs,
`limited`, says whether the limits changed an item, and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

LIMITED = "limited"  # the output's name


class Reason(IntFlag):
    """The bits of `limited`, uint8. 0: the item's action and state are the policy's own, bit for bit."""

    BOUNDS = 1  # the action was out of bounds, or is not allowed
    CHANGE = 2  # it was too far from the previous action, or came too soon after it
    NOT_FINITE = 4  # NaN or an infinity: the fallback was taken
    STATE = 8  # the policy's new state was not finite, and was not kept

    @property
    def label(self) -> str:
        """Its name in metrics and certificates."""
        return str(self.name).lower()


def by_reason(limited: NDArray[Any]) -> dict[Reason, int]:
    """How many items were limited for each reason. `limited`: (B,) uint8, bits of `Reason`."""
    return {reason: int(np.count_nonzero(limited & reason)) for reason in Reason}


@dataclass(frozen=True)
class OutputLimits:
    """The limits of one output. Tuples have a value for each element of an action, row-major; of a chunk, of one action
    in it.

    An action is within `low` and `high` and at most `change` away from the previous one, in arithmetic of its dtype. Or
    it is one of the `allowed` whole numbers, and stays for `dwell` steps; the best one by `scores` replaces others.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    output: str
    fallback: tuple[float, ...] | Literal["hold"]  # "hold": the previous action
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    change: tuple[float, ...] | None = None  # largest difference from the previous action, in each direction
    start: tuple[float, ...] | None = None  # the previous action of an episode's first step; None: that step may be any
    allowed: tuple[int, ...] | None = None
    dwell: int | None = None
    scores: str | None = None  # the output with one score for each value of a discrete action
    previous: str | None = None  # the state that holds the previous action; None: no limit needs it
    age: str | None = None  # the state that counts the steps that the previous action has stayed, up to `dwell`


@dataclass(frozen=True)
class Limits:
    """All limits of a policy. `finite_observations`: a NaN or an infinity in an observation also means the fallback."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    outputs: tuple[OutputLimits, ...]
    finite_observations: bool = False
