"""Reads what a client says about the result of its last step: the headers X-Reward and X-Done."""

from __future__ import annotations

import math

from actserve.core.errors import InvalidRequest
from actserve.engine.recorders import Feedback

REWARD_HEADER, DONE_HEADER = "X-Reward", "X-Done"
_FLAGS = {"0": False, "false": False, "1": True, "true": True}


def read_feedback(reward: str | None, done: str | None) -> Feedback | None:
    """The values of both headers -> the result; None if there is none. Raises `InvalidRequest`."""
    if reward is None and done is None:
        return None
    if done is not None and done not in _FLAGS:
        raise InvalidRequest(f"expected {DONE_HEADER} to be true or false; got {done!r}"[:200])
    return Feedback(None if reward is None else _number(reward), None if done is None else _FLAGS[done])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequest(f"expected {REWARD_HEADER} to be a number; got {text!r}"[:200])
    return value
