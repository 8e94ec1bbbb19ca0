"""Counts: what one process has answered and refused since it began. They only ever grow, and in the end they go with
the version that they are of: a policy may have any number of versions, and what is counted has to stay small.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

from actserve.telemetry.meters import Meters

Transport = Literal["lane", "http", "websocket", "grpc"]
ACT = "/policies/{name}/act"
STREAM = "/policies/{name}/stream"
DEFAULT = {"/act": ACT, "/stream": STREAM}  # what the routes of the default policy are counted as
OK = "200"
KEPT = 16  # the versions of a policy that are remembered when they are not in memory


class ProgramLabels(NamedTuple):
    """What meters are of."""

    policy: str
    version: int
    runtime: str


@dataclass(slots=True)
class Tally:
    """Answers of one kind."""

    answered: int = 0  # with 200: the one that is counted on the fast lane
    codes: Counter[str] = field(default_factory=Counter)  # answered with any other status
    reasons: Counter[str] = field(default_factory=Counter)  # those that were refused, by error code

    def add(self, code: str, reason: str | None = None) -> None:
        """An answer with the status `code`; `reason`: of its refusal."""
        if code == OK:
            self.answered += 1
        else:
            self.codes[code] += 1
        if reason is not None:
            self.reasons[reason] += 1


class Counts:
    """Of one process."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, Transport, str], Tally] = {}  # by policy, "" for none; transport; route
        self.programs: WeakValueDictionary[ProgramLabels, Meters] = WeakValueDictionary()
        self.streams = 0  # open now
        self._last: dict[str, deque[Meters]] = {}  # by policy

    def tally(self, policy: str, transport: Transport, route: str) -> Tally:
        """`policy` is one that there is, and `route` a template: what a client sent would grow without bound."""
        key = (policy, transport, DEFAULT.get(route, route))
        if key not in self.tallies:
            self.tallies[key] = Tally()
        return self.tallies[key]

    def meters(self, program: ProgramLabels) -> Meters:
        """The same ones each time that the program is loaded, unless `KEPT` others have been meanwhile. Whoever adds to
        them holds them."""
        found = self.programs.setdefault(program, Meters())
        self._last.setdefault(program.policy, deque(maxlen=KEPT)).append(found)
        return found
