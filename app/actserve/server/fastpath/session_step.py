"""SessionStep: one step of a session on the fast path: its state is read before, and written with the answer.

The steps of sequences of the Open Inference Protocol are steps of sessions.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from actserve.core.errors import ActserveError
from actserve.core.signature import IS_INIT, Arrays
from actserve.engine.batch import BatchResult
from actserve.engine.policy import Acted
from actserve.engine.recorders import Door, committed
from actserve.engine.registry import Registry
from actserve.server.fastpath.request_heads import RequestHead
from actserve.server.sessions import Session, Sessions, StepResult
from actserve.server.sessions.recorded import step_recorder
from actserve.server.sessions.step_record import StepRecord


class SessionStep:
    """Made by `begin` or `of_sequence`."""

    def __init__(self, sessions: Sessions, session: Session, last: StepRecord, head: RequestHead) -> None:
        self.is_init: bool | None = None  # the reset flag, if the request has it
        self._number = last.step + 1
        self._door: Door = "session" if session.sequence is None else "sequence"
        self._sessions, self._session, self._last = sessions, session, last
        policy = head.codec.endpoint.policy
        self._signature, self._requested = policy.signature, head.step
        self.recorder = step_recorder(policy, session, self._number, self._door, head.previous)
        self._record: StepRecord | None = None  # of this step, once it is taken

    @classmethod
    def begin(cls, sessions: Sessions, head: RequestHead) -> SessionStep | None:
        """The step that a request wants. None: the route handles it, or raises its errors."""
        assert head.session is not None
        policy = head.codec.endpoint.policy
        try:
            session = sessions.recent(policy.name, head.session, head.token) or sessions.resume(
                policy.name, head.session, head.token
            )
        except ActserveError:
            return None
        return cls._next(sessions, session, head)

    @classmethod
    def of_sequence(cls, sessions: Sessions, sequence: int | str, head: RequestHead) -> SessionStep | None:
        """The next step of a sequence that has begun. None: the route handles it, or raises its errors."""
        policy = head.codec.endpoint.policy
        try:
            session = sessions.recent_sequence(policy.name, sequence, head.token) or sessions.resume_sequence(
                policy.name, sequence, head.token
            )
        except ActserveError:
            return None
        return cls._next(sessions, session, head)

    @classmethod
    def _next(cls, sessions: Sessions, session: Session, head: RequestHead) -> SessionStep | None:
        assert session.last is not None
        policy = head.codec.endpoint.policy
        on_version = session.version == policy.version
        by_default = session.exploration in (None, policy.signature.exploration[0])
        by_default = by_default and not session.by_action
        is_next = head.step in (None, session.last.step + 1)
        return cls(sessions, session, session.last, head) if on_version and by_default and is_next else None

    @property
    def state(self) -> Arrays:
        """The state that the step begins with, each (1, *shape); empty before the first step."""
        return self._last.carried(self._signature)

    def fields(self, taken: StepResult | None = None) -> bytes:
        """The header lines of the answer. `taken` is the result of `finish`; without, the step is stored."""
        if self._session.sequence is not None:
            return b""
        step, replayed = (self._number, False) if taken is None else (taken.step, taken.replayed)
        return b"x-step: %d\r\n%s" % (step, b"x-replayed: 1\r\n" if replayed else b"")

    def store(self, outcome: BatchResult, start: int) -> bool:
        """Store the result at `start` of a batch. False if another request has taken the step; see `finish`.

        Raises `SessionsLocked`, after which `finish` goes on, or `SessionTooLarge` and `SessionsUnavailable`.
        """
        results = {name: array[start : start + 1] for name, array in outcome.outputs.items()}
        results |= {state.spec.name: results[state.output] for state in self._signature.state}
        self._record = StepRecord.of(self._number, Acted(results, None, 0, 0), self._signature)
        written = self._sessions.write(self._session, self._last, self._record)
        if written:
            committed(self.recorder)
        return written

    async def finish(self, registry: Registry, observations: Arrays) -> StepResult:
        """The answer after `store` failed: stored once the file is free. If another request has taken the step, the
        answer is as `Sessions.step` gives it for `observations`, each (1, *shape). Raises as it does.
        """
        assert self._record is not None
        write = partial(self._sessions.write, self._session, self._last, self._record)
        if await self._sessions.when_unlocked(write):
            committed(self.recorder)
            return StepResult(self._record.acted(self._signature, self._session.seed), self._number, replayed=False)
        if self.is_init is not None:
            observations = observations | {IS_INIT.name: IS_INIT.zeros(1) | self.is_init}
        session = replace(self._session, last=None)
        if session.sequence is not None:  # it may have begun again
            session = self._sessions.sequence(session.policy, session.sequence, holder=session.holder)
        return await self._sessions.step(registry, session, observations, self._requested, door=self._door)
