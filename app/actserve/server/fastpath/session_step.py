"""SessionStep: one step of a session on the fast path: its state is read with the head, and written with the answer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from actserve.core.errors import ActserveError
from actserve.core.signature import IS_INIT, Arrays
from actserve.engine.batch import BatchResult
from actserve.engine.policy import Acted
from actserve.engine.registry import Registry
from actserve.server.fastpath.request_heads import RequestHead
from actserve.server.sessions import Session, Sessions, StepResult
from actserve.server.sessions.step_record import StepRecord


class SessionStep:
    """Made by `begin`. `number` is the number of the step."""

    def __init__(self, sessions: Sessions, session: Session, last: StepRecord, head: RequestHead) -> None:
        self.number = last.step + 1
        self.is_init: bool | None = None  # the reset flag, if the request has it
        self._sessions, self._session, self._last = sessions, session, last
        self._requested = head.step
        self._signature = head.codec.endpoint.policy.signature
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
        assert session.last is not None
        on_version = session.version == policy.version
        by_default = session.exploration in (None, policy.signature.exploration[0])
        by_default = by_default and not session.by_action
        is_next = head.step in (None, session.last.step + 1)
        return cls(sessions, session, session.last, head) if on_version and by_default and is_next else None

    @property
    def state(self) -> Arrays:
        """The state that the step begins with, each (1, *shape); empty before the first step."""
        return self._last.carried(self._signature)

    def store(self, outcome: BatchResult, start: int) -> bool:
        """Store the result at `start` of a batch. False if another request has taken the step; see `finish`.

        Raises `SessionsLocked`, after which `finish` goes on, or `SessionTooLarge` and `SessionsUnavailable`.
        """
        results = {name: array[start : start + 1] for name, array in outcome.outputs.items()}
        results |= {state.spec.name: results[state.output] for state in self._signature.state}
        self._record = StepRecord.of(self.number, Acted(results, None, 0, 0), self._signature)
        return self._sessions.write(self._session, self._last, self._record)

    async def finish(self, registry: Registry, observations: Arrays) -> StepResult:
        """The answer after `store` failed: stored once the file is free. If another request has taken the step, the
        answer is as `Sessions.step` gives it for `observations`, each (1, *shape). Raises as it does.
        """
        assert self._record is not None
        write = partial(self._sessions.write, self._session, self._last, self._record)
        if await self._sessions.when_unlocked(write):
            return StepResult(self._record.acted(self._signature, self._session.seed), self.number, replayed=False)
        if self.is_init is not None:
            observations = observations | {IS_INIT.name: IS_INIT.zeros(1) | self.is_init}
        session = replace(self._session, last=None)
        return await self._sessions.step(registry, session, observations, self._requested)
