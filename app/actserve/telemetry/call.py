"""Call: one request on the routes or over gRPC, known to all code that works for it. The fast lane has none."""

from __future__ import annotations

import re
import secrets
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import NamedTuple

HEADER = "X-Request-Id"
_SANE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")


class Act(NamedTuple):
    """What a call had a policy do."""

    since_ns: int  # of the monotonic clock
    queue_ns: int
    run_ns: int  # after that


@dataclass(slots=True)
class Call:
    id: str
    begun_ns: int = field(default_factory=perf_counter_ns)
    reason: str | None = None  # the error code, if it was refused
    acts: deque[Act] = field(default_factory=lambda: deque(maxlen=64))  # the last ones: a stream has many
    trace: str | None = None  # the id of the trace that it is part of

    @classmethod
    def of(cls, given: str | None) -> Call:
        """With the id that came with it, if that is one; else with a new one."""
        return cls(given if given is not None and _SANE.fullmatch(given) else secrets.token_hex(8))


current: ContextVar[Call | None] = ContextVar("call", default=None)


def refused(code: str) -> None:
    """What is being worked for is refused with this error code."""
    call = current.get()
    if call is not None:
        call.reason = code


def acted(since_ns: int, queue_ns: int, run_ns: int) -> None:
    call = current.get()
    if call is not None:
        call.acts.append(Act(since_ns, queue_ns, run_ns))
