"""Counts: the answers and refusals of one process since it started.

Counters only grow. The meters of a version are dropped some time after it is unloaded: a policy may have any number of
versions, and memory must stay bounded.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

from actserve.telemetry.meters import Meters

Transport = Literal["fastpath", "http", "websocket", "grpc", "zeromq", "other"]
ACT = "/policies/{name}/act"
ACT_ON_VERSION = "/policies/{name}/versions/{version}/act"
STREAM = "/policies/{name}/stream"
DEFAULT = {"/act": ACT, "/stream": STREAM}  # routes of the default policy count as these
OK = "200"
KEPT_VERSIONS = 16  # versions of a policy whose meters are kept after they are unloaded


class ProgramLabels(NamedTuple):
    """The metric labels of one program."""

    policy: str
    version: int
    runtime: str


@dataclass(slots=True)
class Tally:
    """The answers of one policy, transport and route."""

    answered: int = 0  # status 200; an int of its own, because the fast path counts it
    codes: Counter[str] = field(default_factory=Counter)  # by any other status
    reasons: Counter[str] = field(default_factory=Counter)  # refusals, by error code

    def add(self, code: str, reason: str | None = None) -> None:
        """Count an answer with the status `code`. `reason` is the error code of a refusal."""
        if code == OK:
            self.answered += 1
        else:
            self.codes[code] += 1
        if reason is not None:
            self.reasons[reason] += 1


class Counts:
    """The counters of one process."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, Transport, str], Tally] = {}  # by policy ("" for none), transport and route
        self.programs: WeakValueDictionary[ProgramLabels, Meters] = WeakValueDictionary()
        self.streams = 0  # open now
        self._recent: dict[str, deque[Meters]] = {}  # by policy; keeps meters of unloaded versions alive

    def tally(self, policy: str, transport: Transport, route: str) -> Tally:
        """`policy` must exist, and `route` must be a template: names from clients would grow without bound."""
        key = (policy, transport, DEFAULT.get(route, route))
        if key not in self.tallies:
            self.tallies[key] = Tally()
        return self.tallies[key]

    def meters(self, program: ProgramLabels) -> Meters:
        """The meters of a program. The caller must hold a reference while it adds to them.

        A program that is loaded again gets the same meters, unless `KEPT_VERSIONS` others were loaded meanwhile.
        """
        found = self.programs.setdefault(program, Meters())
        self._recent.setdefault(program.policy, deque(maxlen=KEPT_VERSIONS)).append(found)
        return found
