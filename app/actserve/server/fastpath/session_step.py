"""SessionStep: one step of a session on the fast path: its state is read before, and written with the answer.

The steps of sequences of the Open Inference Protocol are steps of sessions.
"""

from __future__ import annotations

from collections.abc import Callable

from actserve.core.errors import ActserveError, SessionsLocked
from actserve.core.signature import IS_INIT, Arrays
from actserve.engine.batch import BatchResult
from actserve.engine.recorders import Door, committed
from actserve.engine.registry import Registry
from actserve.server.fastpath.request_heads import RequestHead
from actserve.server.sessions import Sessions, StepResult
from actserve.server.sessions.recorded import step_recorder
from actserve.server.sessions.session import Resumed
from actserve.server.sessions.step_record import StepRecord
from actserve.server.sessions.step_writer import StepChange

Stored = Callable[["bool | ActserveError"], None]
"""Called with whether the step is stored, or with why it cannot be. If not, `SessionStep.finish` goes on."""


class SessionStep:
    """Made by `begin` or `of_sequence`."""

    def __init__(self, sessions: Sessions, resumed: Resumed, head: RequestHead) -> None:
        self.is_init: bool | None = None  # the reset flag, if the request has it
        session, last = resumed
        self._number = last.step + 1
        self._door: Door = "session" if session.sequence is None else "sequence"
        self._sessions, self._session, self._last = sessions, session, last
        policy = head.codec.endpoint.policy
        self._signature, self._requested = policy.signature, head.step
        self.recorder = step_recorder(policy, session, self._number, self._door, head.previous)
        self._change: StepChange | None = None  # of this step, once it is taken

    @classmethod
    def begin(cls, sessions: Sessions, head: RequestHead) -> SessionStep | None:
        """The step that a request wants. None: the route handles it, or raises its errors."""
        assert head.session is not None
        policy = head.codec.endpoint.policy
        try:
            resumed = sessions.recent(policy.name, head.session, head.token) or sessions.resume(
                policy.name, head.session, head.token
            )
        except ActserveError:
            return None
        return cls._next(sessions, resumed, head)

    @classmethod
    def of_sequence(cls, sessions: Sessions, sequence: int | str, head: RequestHead) -> SessionStep | None:
        """The next step of a sequence that has begun. None: the route handles it, or raises its errors."""
        policy = head.codec.endpoint.policy
        try:
            resumed = sessions.recent_sequence(policy.name, sequence, head.token) or sessions.resume_sequence(
                policy.name, sequence, head.token
            )
        except ActserveError:
            return None
        return cls._next(sessions, resumed, head)

    @classmethod
    def _next(cls, sessions: Sessions, resumed: Resumed, head: RequestHead) -> SessionStep | None:
        session, last = resumed
        policy = head.codec.endpoint.policy
        on_version = session.version == policy.version
        by_default = session.exploration in (None, policy.signature.exploration[0])
        by_default = by_default and not session.by_action
        is_next = head.step in (None, last.step + 1)
        return cls(sessions, resumed, head) if on_version and by_default and is_next else None

    @property
    def state(self) -> Arrays:
        """The state that the step begins with, to be copied, each (1, *shape); empty before the first step."""
        return self._last.carried(self._signature, copy=False)

    def fields(self, taken: StepResult | None = None) -> bytes:
        """The header lines of the answer. `taken` is the result of `finish`; without, the step is stored."""
        if self._session.sequence is not None:
            return b""
        step, replayed = (self._number, False) if taken is None else (taken.step, taken.replayed)
        return b"x-step: %d\r\n%s" % (step, b"x-replayed: 1\r\n" if replayed else b"")

    def store(self, outcome: BatchResult, start: int, stored: Stored) -> None:
        """Store the result at `start` of a batch with the other steps of that batch, and then call `stored`."""
        record = StepRecord.of_batch(self._number, outcome.outputs, start, self._signature)
        self._change = StepChange(self._session, self._last, record)

        def written(result: bool | ActserveError) -> None:
            if result is True:
                committed(self.recorder)
            stored(False if isinstance(result, SessionsLocked) else result)

        self._sessions.writer.write_soon(self._change, written)

    async def finish(self, registry: Registry, observations: Arrays) -> StepResult:
        """The answer to a step that is not stored: stored once the file is free. If another request has taken the step,
        the answer is as `Sessions.step` gives it for `observations`, each (1, *shape). Raises as it does.
        """
        assert self._change is not None
        change, session = self._change, self._session
        if await self._sessions.when_unlocked(lambda: self._sessions.writer.write(change)):
            committed(self.recorder)
            return StepResult(change.new.acted(self._signature, session.seed), self._number, replayed=False)
        if self.is_init is not None:
            observations = observations | {IS_INIT.name: IS_INIT.zeros(1) | self.is_init}
        if session.sequence is not None:  # it may have begun again
            session = self._sessions.sequence(session.policy, session.sequence, holder=session.holder)
        return await self._sessions.step(registry, session, observations, self._requested, door=self._door)
