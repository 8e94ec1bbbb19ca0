"""Call: the current request, in a context variable. Routes and gRPC set it; the fast path does not."""

from __future__ import annotations

import re
import secrets
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import NamedTuple

HEADER = "X-Request-Id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")


def is_request_id(text: str) -> bool:
    """Whether a client's request id is used: up to 128 characters that are safe in logs and headers."""
    return bool(_REQUEST_ID.fullmatch(text))


class Act(NamedTuple):
    """One use of a policy during a call."""

    since_ns: int  # start of the wait in the queue, by `perf_counter_ns`
    queue_ns: int
    run_ns: int  # after the wait


@dataclass(slots=True)
class Call:
    id: str
    begun_ns: int = field(default_factory=perf_counter_ns)
    reason: str | None = None  # the error code of a refusal
    acts: deque[Act] = field(default_factory=lambda: deque(maxlen=64))  # the last ones: a stream has many
    trace: str | None = None  # trace id

    @classmethod
    def of(cls, given: str | None) -> Call:
        """A call with the client's request id, or with a new one if that is missing or invalid."""
        return cls(given if given is not None and is_request_id(given) else secrets.token_hex(8))


current: ContextVar[Call | None] = ContextVar("call", default=None)


def record_refusal(code: str) -> None:
    """Record the error code of the current request."""
    call = current.get()
    if call is not None:
        call.reason = code


def record_act(since_ns: int, queue_ns: int, run_ns: int) -> None:
    call = current.get()
    if call is not None:
        call.acts.append(Act(since_ns, queue_ns, run_ns))
