"""Sessions: state held by the server between two requests of one client.

They live in one SQLite file, so that every worker process reaches every session, and a restart or a redeploy loses
none. Routing by id would carry each 100 KB screen through a second process; state sealed into a token would change
the id at each step, and could be neither bounded, listed nor ended. Nothing is locked while a policy runs: a step
reads the session, runs, and writes only if the session is still where it was (compare and swap on the step number).
Of two attempts at one step one wins; the other gives its answer.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from actserve.core.completion import MAX_SEED, step_seed
from actserve.core.errors import (
    InvalidRequest,
    InvalidTensor,
    NotFound,
    SessionExpired,
    SessionTooLarge,
    StepConflict,
    UnknownSession,
)
from actserve.core.signature import Arrays, Exploration, Signature
from actserve.engine.policy import Acted, Policy
from actserve.engine.registry import Registry
from actserve.server.access.tokens import Token
from actserve.server.admission import Admission
from actserve.server.sessions.ids import SessionIds, first_number
from actserve.server.sessions.session_file import SessionFile
from actserve.server.sessions.step_record import StepRecord

log = logging.getLogger("actserve")

SWEEP_EVERY_S = 1.0
SWEEP_AT_MOST = 100  # sessions, so that a sweep holds the event loop for a millisecond


@dataclass(frozen=True)
class SessionLimits:
    """What the sessions of one service may cost."""

    sessions: int = 10_000
    bytes: int = 256 << 20  # state and last answers together
    idle_s: float = 600.0  # without a step for so long, a session is forgotten
    sessions_each: int = 1000  # of the holders of one token, unless that says otherwise


@dataclass(frozen=True)
class Session:
    """One session as it stands. `step` is the number of the last step done; the first one will be 1."""

    id: str
    policy: str
    version: int
    step: int
    seed: int | None  # of the whole session; each step's noise comes from (seed, step)
    exploration: Exploration | None
    idle_s: float  # since the last step
    number: int  # in the file
    holder: Token | None  # who alone may use it; None: whoever has the id


@dataclass(frozen=True)
class StepResult:
    """The answer to one step. `replayed`: the step had been done before, and this is what it came to then."""

    acted: Acted  # outputs only, no state, each (1, *shape)
    step: int
    replayed: bool


@dataclass(frozen=True)
class SessionStatistics:
    sessions: int  # held now; of those that timed out some for a second or so yet
    bytes: int  # their state and last answers


async def policy_of(registry: Registry, session: Session) -> Policy:
    """The version that the session began with. Raises `SessionExpired` when that is no longer in the store."""
    try:
        return await registry.resume(session.policy, session.version)
    except NotFound as error:
        raise SessionExpired(f"the version that it began with is gone: {error.message}") from error


class Sessions:
    """The sessions of one service, a context manager over their file. Every method is short and may be called in the
    event loop, from any worker. All raise `SessionsUnavailable` when the file cannot be used. `home`: which host this
    is, where several have files of their own."""

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
        self._clock = clock  # seconds: all processes of a host have the same, and nobody can set it
        self._swept_s = 0.0
        self._ids = SessionIds(b"")

    def __enter__(self) -> Self:
        self._file.open()
        ((key,),) = self._file.rows("SELECT key FROM service")
        self._ids = SessionIds(key, self._home)
        now_ms = self._now_ms()  # what was used after it was used before the host began anew
        self._file.change("UPDATE session SET used_ms = ? WHERE used_ms > ?", now_ms, now_ms)
        return self

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
        holder: Token | None = None,
    ) -> Session:
        """A new session. `owner` is a secret that `owned` lists by. `sequence`: addressed by a number or a name that
        the client chose, within `policy`, `owner` and `holder`, instead of an id; it replaces one of that name.
        `holder`: whoever has this token, or one of its name, owns it, and to all others it does not exist. Where there
        is no room, the session that was idle for longest goes, of the holder's own if there is one."""
        seed = secrets.randbelow(MAX_SEED) if seed is None else seed
        if not 0 <= seed <= MAX_SEED:
            raise InvalidRequest(f"expected a seed of 0 to 2**63 - 1; got {seed}")
        owned_by = self._ids.owner(owner, holder)
        named = None if sequence is None else self._ids.sequence(policy, sequence, owner, holder)
        with self._file.transaction():
            self._file.change("DELETE FROM session WHERE sequence = ?", named)
            ((number,),) = self._file.rows(
                "INSERT INTO session (used_ms, policy, version, seed, exploration, owner, sequence)"
                " VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING number",
                *(self._now_ms(), policy, version, seed, exploration, owned_by, named),
            )
            if holder is not None:
                self._keep_within(holder, number)
            self._make_room(number, holder)
        id_ = self._ids.id(policy, number, holder)
        return Session(id_, policy, version, 0, seed, exploration, 0.0, number, holder)

    def get(self, policy: str, id_: str, holder: Token | None = None) -> Session:
        """Raises `UnknownSession` (never issued here for this policy and this holder), `SessionExpired` (issued, and
        gone) or `SessionElsewhere` (issued by another host)."""
        found = self._find(holder, "number = ?", self._ids.number(policy, id_, holder))
        if not found:
            raise SessionExpired
        return found[0]

    def sequence(
        self, policy: str, sequence: int | str, owner: str | None = None, holder: Token | None = None
    ) -> Session:
        """The session begun with this `sequence`; the number 1 and the text "1" are two. Raises `UnknownSession`."""
        found = self._find(holder, "sequence = ?", self._ids.sequence(policy, sequence, owner, holder))
        if not found:
            raise UnknownSession(f"no sequence {str(sequence)[:80]!r} of {policy}: never begun, ended or timed out")
        return found[0]

    def owned(self, policy: str, owner: str | None, holder: Token | None = None) -> list[Session]:
        """The sessions begun with this `owner`, or by this `holder`, the first begun first."""
        found = self._find(holder, "owner = ? AND policy = ?", self._ids.owner(owner, holder), policy)
        return sorted(found, key=lambda session: session.number)

    def versions(self) -> set[tuple[str, int]]:
        """The policies, by name and version, that any session is on."""
        found = self._file.rows("SELECT DISTINCT policy, version FROM session WHERE used_ms > ?", self._idle_since_ms())
        return {(policy, version) for policy, version in found}

    def end(self, session: Session) -> None:
        self._file.change("DELETE FROM session WHERE number = ?", session.number)

    def statistics(self) -> SessionStatistics:
        self._sweep()
        ((count, size),) = self._file.rows("SELECT sessions, bytes FROM service")
        return SessionStatistics(count, size)

    async def step(
        self, registry: Registry, session: Session, tensors: Arrays, step: int | None = None, patience_ns: int = 0
    ) -> StepResult:
        """One item's step: `tensors` are observations and flags, each (1, *shape), without state.

        `step` numbers it (the last one's number plus one); the last one's number again gives the stored answer; any
        other raises `StepConflict`. None: whatever comes next. Raises `InvalidRequest`, `SessionExpired`, or what the
        policy raises; then the session has not moved.
        """
        policy = await policy_of(registry, session)
        while True:
            last, seed = self._read(session)
            number = last.step + 1
            if 0 < last.step == step:
                return StepResult(last.acted(policy.signature, seed), step, replayed=True)
            if step is not None and step != number:
                raise StepConflict(number, step)
            _check(policy.signature, tensors)
            inputs = tensors | last.carried(policy.signature)
            noise_seed = step_seed(seed, number)
            acted = await self._admission.act(policy, inputs, 1, session.exploration, noise_seed, patience_ns)
            if self._move(session, last, StepRecord.of(number, acted, policy.signature)):
                outputs = {name: acted.outputs[name] for name in policy.signature.output_names}
                return StepResult(replace(acted, outputs=outputs), number, replayed=False)

    def stored(self, policy: Policy, session: Session, step: int) -> StepResult | None:
        """The answer to `step` if that is the last one done: what a retry gets, whatever else it carries."""
        last, seed = self._read(session)
        return StepResult(last.acted(policy.signature, seed), step, replayed=True) if 0 < last.step == step else None

    def _read(self, session: Session) -> tuple[StepRecord, int]:
        """The session's record and seed. Raises `SessionExpired`."""
        self._sweep()
        found = self._file.rows(
            "SELECT seed, checksum, step, seeded, answer, state FROM session WHERE number = ? AND used_ms > ?",
            *(session.number, self._idle_since_ms()),
        )
        if not found:
            raise SessionExpired
        seed, checksum, *fields = found[0]
        record = StepRecord(*fields)
        if record.step and checksum != record.checksum(session.number):
            log.error("the record of a session of %s is damaged: the session is forgotten", session.policy)
            self.end(session)
            raise SessionExpired
        return record, seed

    def _move(self, session: Session, last: StepRecord, new: StepRecord) -> bool:
        """From `last` on to `new`. False when another attempt has. Raises `SessionTooLarge`."""
        number = session.number
        values = (self._now_ms(), new.step, new.seeded, new.checksum(number), new.answer, new.state)
        columns = "used_ms = ?, step = ?, seeded = ?, checksum = ?, answer = ?, state = ?"
        where = "WHERE number = ? AND step = ?"
        if new.size_bytes == last.size_bytes:  # nobody has to make room
            return self._file.change(f"UPDATE session SET {columns} {where}", *values, number, last.step) > 0
        with self._file.transaction():
            update = f"UPDATE session SET {columns}, bytes = ? {where}"
            moved = self._file.change(update, *values, new.size_bytes, number, last.step) > 0
            self._make_room(number, session.holder)
        return moved

    def _keep_within(self, holder: Token, keep: int) -> None:
        """Forget the holder's sessions that were idle for longest, `keep` never, until it has no more than it may."""
        ((count,),) = self._file.rows("SELECT count(*) FROM session WHERE owner = ?", self._ids.owner(None, holder))
        for _ in range(count - (holder.sessions or self.limits.sessions_each)):
            self._forget(keep, holder)

    def _make_room(self, keep: int, holder: Token | None) -> None:
        """Forget the sessions that were idle for longest, `keep` never, the holder's own before those of others, until
        the rest fits."""
        while True:
            ((count, size),) = self._file.rows("SELECT sessions, bytes FROM service")
            if count <= self.limits.sessions and size <= self.limits.bytes:
                return
            if not ((holder is not None and self._forget(keep, holder)) or self._forget(keep)):
                raise SessionTooLarge(self.limits.bytes, size)

    def _forget(self, keep: int, holder: Token | None = None) -> bool:
        """The session that was idle for longest, of all or of the holder's, if there is another one than `keep`."""
        whose, values = ("", ()) if holder is None else (" AND owner = ?", (self._ids.owner(None, holder),))
        oldest = f"(SELECT number FROM session WHERE number <> ?{whose} ORDER BY used_ms LIMIT 1)"
        return self._file.change(f"DELETE FROM session WHERE number = {oldest}", keep, *values) > 0

    def _sweep(self) -> None:
        """Every second or so, forget some of those that were idle for too long."""
        now = self._clock()
        if 0 <= now - self._swept_s < SWEEP_EVERY_S:
            return
        idle = "(SELECT number FROM session WHERE used_ms <= ? ORDER BY used_ms LIMIT ?)"
        gone = self._file.change(f"DELETE FROM session WHERE number IN {idle}", self._idle_since_ms(), SWEEP_AT_MOST)
        if gone < SWEEP_AT_MOST:
            self._swept_s = now

    def _find(self, holder: Token | None, condition: str, *values: Any) -> list[Session]:
        self._sweep()
        found = self._file.rows(
            "SELECT number, policy, version, step, seed, exploration, used_ms FROM session"
            f" WHERE {condition} AND used_ms > ?",
            *(*values, self._idle_since_ms()),
        )
        now_ms = self._now_ms()
        return [
            Session(
                self._ids.id(policy, number, holder), policy, version, step, seed, exploration,
                max(0, now_ms - used_ms) / 1000, number, holder,
            )
            for number, policy, version, step, seed, exploration, used_ms in found
        ]  # fmt: skip

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _idle_since_ms(self) -> int:
        return self._now_ms() - int(self.limits.idle_s * 1000)


def _check(signature: Signature, tensors: Arrays) -> None:
    """Raises `InvalidRequest` unless `tensors` are one item without state."""
    carried = [state.spec.name for state in signature.state if state.spec.name in tensors]
    if carried:
        raise InvalidRequest(f"expected no state, which the session holds; got {', '.join(carried)}", got=carried)
    for name, array in tensors.items():
        if len(array) != 1:
            raise InvalidTensor(name, "one item, as a session takes at each step", f"{len(array)}")
