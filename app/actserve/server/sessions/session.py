"""Session: a snapshot of one session. Resumed: one that is about to take the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from actserve.core.signature import Exploration
from actserve.server.access.tokens import Token
from actserve.server.sessions.step_record import StepRecord


@dataclass(frozen=True)
class Session:
    """A snapshot of a session. `step` is the number of the last step; 0 before the first one."""

    id: str
    policy: str
    version: int
    step: int
    seed: int  # the noise of each step comes from (seed, step)
    exploration: Exploration | None
    idle_s: float  # since the last step
    number: int  # the primary key in the file
    holder: Token | None  # only this token may use the session; None: anyone who knows the id
    by_action: bool = False  # chunks of actions are handed out one by one
    sequence: int | str | None = None  # the client's name, if the session was found by it


class Resumed(NamedTuple):
    """A session and the record of its last step, which can be later than the snapshot."""

    session: Session
    last: StepRecord
