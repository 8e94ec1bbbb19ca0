"""Sessions: state that the service holds between two requests of one client.

Sessions are in one SQLite file, so every worker process reaches every session, and sessions survive restarts and
redeploys. Two alternatives were rejected. Routing by id would send each 100 KB screen through a second process. State
sealed into a token would change the id at each step, and could not be bounded, listed or ended.

Nothing is locked while a policy runs. A step reads the session, runs, and writes only if the step number has not
changed (compare and swap). If two requests take the same step, one writes, and the other returns the stored answer.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from actserve.core.completion import MAX_SEED, step_seed
from actserve.core.errors import (
    InvalidRequest,
    InvalidTensor,
    NotFound,
    SessionExpired,
    SessionsLocked,
    SessionsUnavailable,
    StepConflict,
    UnknownSession,
)
from actserve.core.signature import Arrays, Exploration, Signature
from actserve.engine.policy import Acted, Policy
from actserve.engine.recorders import Door, Feedback, committed
from actserve.engine.registry import Registry
from actserve.server.access.tokens import Token
from actserve.server.admission import Admission
from actserve.server.sessions.chunk_state import by_action, take_action
from actserve.server.sessions.ids import SessionIds, first_number, home_of_number
from actserve.server.sessions.recent_sessions import RecentSessions
from actserve.server.sessions.recorded import step_recorder
from actserve.server.sessions.room import Room, SessionLimits
from actserve.server.sessions.session import Resumed, Session
from actserve.server.sessions.session_file import SessionFile
from actserve.server.sessions.step_record import StepRecord
from actserve.server.sessions.step_writer import StepChange, StepWriter

__all__ = [
    "Session",
    "SessionLimits",
    "SessionStatistics",
    "Sessions",
    "StepResult",
    "policy_of",
    "replayed",
    "signature_of",
]

log = logging.getLogger("actserve")

LOCK_TIMEOUT_S = 5.0
MAX_PAUSE_S = 0.05  # between two attempts
_RECORD = "checksum, step, seeded, answer, state"  # the columns of a `StepRecord`

Result = TypeVar("Result")


@dataclass(frozen=True)
class StepResult:
    """The answer to one step. `replayed`: the step was taken before, and this is the stored answer."""

    acted: Acted  # outputs only, no state, each (1, *shape)
    step: int
    replayed: bool


@dataclass(frozen=True)
class SessionStatistics:
    sessions: int  # including some that expired in the last second
    bytes: int  # of their states and last answers


async def policy_of(registry: Registry, session: Session) -> Policy:
    """The policy version that the session began with. Raises `SessionExpired` if the store no longer has it."""
    try:
        return await registry.resume(session.policy, session.version)
    except NotFound as error:
        raise SessionExpired(f"the version that it began with is gone: {error.message}") from error


def signature_of(policy: Policy, session: Session) -> Signature:
    """The signature of a step of `session`: its outputs, and the state that the session keeps."""
    return by_action(policy.signature) if session.by_action else policy.signature


class Sessions:
    """The sessions of one service. A context manager that opens and closes their file.

    Every method is short enough for the event loop. All raise `SessionsUnavailable` if the file cannot be used. A
    method that changes the file raises `SessionsLocked` while another process writes (`when_unlocked`). `clock` is
    monotonic: the same in all processes of a host, and never set back. `home` is the number of this host, if several
    hosts hold sessions.
    """

    def __init__(
        self,
        path: Path,
        limits: SessionLimits,
        clock: Callable[[], float] = time.monotonic,
        home: int | None = None,
        admission: Admission | None = None,
    ) -> None:
        self.limits = limits
        self._admission = admission or Admission()
        self._file = SessionFile(path, first_number(home or 0))
        self._home = home
        self._room = Room(self._file, limits, clock)
        self._recent = RecentSessions(int(limits.idle_s * 1000))
        self.writer = StepWriter(self._file, self._room, self._recent)
        self._ids = SessionIds(b"")

    def __enter__(self) -> Self:
        self._file.open()
        ((key,),) = self._file.rows("SELECT key FROM service")
        self._refuse_file_of_another_home()
        self._ids = SessionIds(key, self._home)
        now_ms = self._room.now_ms  # the clock restarts with the host, so older times can be in the future
        self._file.change("UPDATE session SET used_ms = ? WHERE used_ms > ?", now_ms, now_ms)
        self._file.never_wait()
        return self

    def _refuse_file_of_another_home(self) -> None:
        ((last,),) = self._file.rows("SELECT seq FROM sqlite_sequence WHERE name = 'session'")
        if self._home is not None and (found := home_of_number(last)) != self._home:
            self._file.close()
            raise SessionsUnavailable(
                f"the sessions file is of the host with ACTSERVE_SESSION_HOME={found}, and this host has {self._home}: "
                "give each host its own file"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def begin(
        self,
        policy: str,
        version: int,
        *,
        owner: str | None = None,
        seed: int | None = None,
        exploration: Exploration | None = None,
        sequence: int | str | None = None,
        key: str | None = None,
        holder: Token | None = None,
        by_action: bool = False,
    ) -> Session:
        """Start a session, or return the one that was started with this `key`, an idempotency key of the client.

        `owner` is a secret of the client, for `owned`. `sequence` is a number or name that the client chose instead of
        an id, within `policy`, `owner` and `holder`; it replaces an older sequence with this name. `holder` is the
        token that owns the session: for tokens of another name, the session does not exist. If there is no room, the
        session that was idle for longest is deleted, one of the same holder if possible.
        """
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise InvalidRequest(f"expected a seed of 0 to 2**63 - 1; got {seed}")
        owner_digest = self._ids.owner(owner, holder)
        sequence_digest = None if sequence is None else self._ids.sequence(policy, sequence, owner, holder)
        if key is not None:
            sequence_digest = self._ids.key(policy, key, owner, holder)
        with self._file.transaction():
            if key is not None and (found := self._find(holder, "sequence = ?", sequence_digest)):
                return _same(found[0], seed, exploration, by_action)
            seed = secrets.randbelow(MAX_SEED) if seed is None else seed
            self._file.change("DELETE FROM session WHERE sequence = ?", sequence_digest)
            ((number,),) = self._file.rows(
                "INSERT INTO session (used_ms, policy, version, seed, exploration, by_action, owner, sequence)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING number",
                *(self._room.now_ms, policy, version, seed, exploration, by_action, owner_digest, sequence_digest),
            )
            if holder is not None:
                self._room.enforce_token_limit(holder, number)
            self._room.make(number, holder)
        id_ = self._ids.id(policy, number, holder)
        return Session(id_, policy, version, 0, seed, exploration, 0.0, number, holder, by_action)

    def get(self, policy: str, id_: str, holder: Token | None = None) -> Session:
        """The session with this id. Raises:

        `UnknownSession`: this host never issued the id for this policy and holder.
        `SessionExpired`: the id was issued, but its session is gone.
        `SessionElsewhere`: another host issued the id.
        """
        found = self._find(holder, "number = ?", self._ids.number(policy, id_, holder))
        if not found:
            raise SessionExpired
        return found[0]

    def resume(self, policy: str, id_: str, holder: Token | None = None) -> Resumed:
        """As `get`, for a session that is about to take the next step."""
        found = self._resumed(policy, holder, "number = ?", self._ids.number(policy, id_, holder))
        if found is None:
            raise SessionExpired
        return found

    def resume_sequence(self, policy: str, sequence: int | str, holder: Token | None = None) -> Resumed:
        """As `sequence`, for one that is about to take the next step."""
        digest = self._ids.sequence(policy, sequence, None, holder)
        found = self._resumed(policy, holder, "sequence = ?", digest)
        if found is None:
            raise _unknown_sequence(policy, sequence)
        return Resumed(replace(found.session, sequence=sequence), found.last)

    def _resumed(self, policy: str, holder: Token | None, condition: str, value: int | bytes) -> Resumed | None:
        self._room.sweep()
        found = self._file.rows(
            f"SELECT number, version, seed, exploration, by_action, used_ms, {_RECORD} FROM session"
            f" WHERE {condition} AND used_ms > ?",
            *(value, self._room.idle_since_ms),
        )
        if not found:
            return None
        number, version, seed, exploration, by_action, used_ms, *fields = found[0]
        last = self._checked(policy, number, fields)
        session = Session(
            self._ids.id(policy, number, holder), policy, version, last.step, seed, exploration,
            max(0, self._room.now_ms - used_ms) / 1000, number, holder, bool(by_action),
        )  # fmt: skip
        return Resumed(session, last)

    def recent(self, policy: str, id_: str, holder: Token | None = None) -> Resumed | None:
        """The session after the last step that this process took, without reading the file; None: it took none lately.

        Another process may have stepped or ended it since: then the next step is not written.
        """
        return self._recent.get(policy, id_, None, holder, self._room.now_ms)

    def recent_sequence(self, policy: str, sequence: int | str, holder: Token | None = None) -> Resumed | None:
        """As `recent`, the session of this sequence. Another process may have begun the sequence again, too."""
        return self._recent.get(policy, None, sequence, holder, self._room.now_ms)

    def sequence(
        self, policy: str, sequence: int | str, owner: str | None = None, holder: Token | None = None
    ) -> Session:
        """The session begun with this `sequence`. The number 1 and the text "1" differ. Raises `UnknownSession`."""
        found = self._find(holder, "sequence = ?", self._ids.sequence(policy, sequence, owner, holder))
        if not found:
            raise _unknown_sequence(policy, sequence)
        return found[0]

    def owned(self, policy: str, owner: str | None, holder: Token | None = None) -> list[Session]:
        """The sessions of this `holder` or, without one, of this `owner`, oldest first."""
        found = self._find(holder, "owner = ? AND policy = ?", self._ids.owner(owner, holder), policy)
        return sorted(found, key=lambda session: session.number)

    def versions(self) -> set[tuple[str, int]]:
        """(policy name, version) of all sessions."""
        found = self._file.rows(
            "SELECT DISTINCT policy, version FROM session WHERE used_ms > ?", self._room.idle_since_ms
        )
        return {(policy, version) for policy, version in found}

    def end(self, session: Session) -> None:
        self._recent.forget(session)
        self._delete(session.number)

    def statistics(self) -> SessionStatistics:
        self._room.sweep()
        ((count, size),) = self._file.rows("SELECT sessions, bytes FROM service")
        return SessionStatistics(count, size)

    async def step(
        self,
        registry: Registry,
        session: Session,
        tensors: Arrays,
        step: int | None = None,
        patience_ns: int = 0,
        door: Door = "session",
        previous: Feedback | None = None,
        last: StepRecord | None = None,
    ) -> StepResult:
        """Take one step. `tensors` are observations and flags, each (1, *shape), without state.

        `step` is the number of the step: the last one plus one, or None for the next one. The last number again returns
        the stored answer; any other raises `StepConflict`. `door` and `previous`, the feedback on the step before, are
        for the recording. `last` is the record of the last step, if it was read already.

        Also raises `InvalidRequest`, `SessionExpired`, and as the policy. If it raises, the state of the session has
        not changed.
        """
        policy = await policy_of(registry, session)
        signature = signature_of(policy, session)
        last = last or self._read(session)
        while True:
            number = last.step + 1
            if 0 < last.step == step:
                return replayed(policy, session, last)
            if step is not None and step != number:
                raise StepConflict(number, step)
            _check(policy.signature, tensors)
            inputs = tensors | last.carried(signature)
            recorder = step_recorder(policy, session, number, door, previous)
            options = (1, session.exploration, step_seed(session.seed, number), patience_ns, recorder)
            if session.by_action:
                acted = await take_action(
                    policy.signature,
                    inputs,
                    lambda inputs: self._admission.act(policy, inputs, *options),  # noqa: B023
                )
            else:
                acted = await self._admission.act(policy, inputs, *options)
            record = StepRecord.of(number, acted, signature)
            if await self.when_unlocked(partial(self.writer.write, StepChange(session, last, record))):
                committed(acted.recorder)
                outputs = {name: acted.outputs[name] for name in signature.output_names}
                return StepResult(replace(acted, outputs=outputs), number, replayed=False)
            last = self._read(session)

    async def when_unlocked(self, change: Callable[[], Result]) -> Result:
        """The result of `change`, which is called again while another process holds the file, for `LOCK_TIMEOUT_S`.

        A write of another worker takes about 20 µs. Then raises `SessionsLocked`.
        """
        until_s = time.monotonic() + LOCK_TIMEOUT_S
        for attempt in itertools.count():
            try:
                return change()
            except SessionsLocked:
                if time.monotonic() > until_s:
                    raise
            await asyncio.sleep(0 if attempt < 2 else min(0.001 * 2 ** (attempt - 2), MAX_PAUSE_S))
        raise AssertionError("the attempts have no end")

    def _read(self, session: Session) -> StepRecord:
        """The record of the session's last step. Raises `SessionExpired`."""
        self._room.sweep()
        found = self._file.rows(
            f"SELECT {_RECORD} FROM session WHERE number = ? AND used_ms > ?",
            *(session.number, self._room.idle_since_ms),
        )
        if not found:
            raise SessionExpired
        return self._checked(session.policy, session.number, found[0])

    def _checked(self, policy: str, number: int, fields: Sequence[Any]) -> StepRecord:
        """The record in the columns `_RECORD`. Raises `SessionExpired` if it is damaged."""
        checksum, *values = fields
        record = StepRecord(*values)
        if record.step and checksum != record.checksum(number):
            log.error("the record of a session of %s is damaged: the session is deleted", policy)
            self._delete(number)
            raise SessionExpired
        return record

    def _delete(self, number: int) -> None:
        self._file.change("DELETE FROM session WHERE number = ?", number)

    def _find(self, holder: Token | None, condition: str, *values: Any) -> list[Session]:
        self._room.sweep()
        found = self._file.rows(
            "SELECT number, policy, version, step, seed, exploration, by_action, used_ms FROM session"
            f" WHERE {condition} AND used_ms > ?",
            *(*values, self._room.idle_since_ms),
        )
        now_ms = self._room.now_ms
        return [
            Session(
                self._ids.id(policy, number, holder), policy, version, step, seed, exploration,
                max(0, now_ms - used_ms) / 1000, number, holder, bool(by_action),
            )
            for number, policy, version, step, seed, exploration, by_action, used_ms in found
        ]  # fmt: skip


def replayed(policy: Policy, session: Session, last: StepRecord) -> StepResult:
    """The stored answer to the last step."""
    return StepResult(last.acted(signature_of(policy, session), session.seed), last.step, replayed=True)


def _unknown_sequence(policy: str, sequence: int | str) -> UnknownSession:
    return UnknownSession(f"no sequence {str(sequence)[:80]!r} of {policy}: never begun, ended or timed out")


def _same(session: Session, seed: int | None, exploration: Exploration | None, by_action: bool) -> Session:
    """The session of an idempotency key. Raises `InvalidRequest` if it began otherwise than it is asked for."""
    options = (session.exploration, session.by_action)
    if seed not in (None, session.seed) or (exploration or session.exploration, by_action) != options:
        raise InvalidRequest("this idempotency key began a session with other options; expected the same")
    return session


def _check(signature: Signature, tensors: Arrays) -> None:
    """Raise `InvalidRequest` unless `tensors` are one item without state."""
    carried = [state.spec.name for state in signature.state if state.spec.name in tensors]
    if carried:
        raise InvalidRequest(f"expected no state, which the session holds; got {', '.join(carried)}", got=carried)
    for name, array in tensors.items():
        if len(array) != 1:
            raise InvalidTensor(name, "one item, as a session takes at each step", f"{len(array)}")
