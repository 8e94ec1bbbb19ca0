"""RecentSessions: the sessions that this process stepped last, so that their next step needs no reading.

An entry can be out of date: another process may have stepped or ended the session. Then the next step is not written,
and its policy runs in vain. Behind a proxy that shares its connections this would happen to every second step, so a
session that was stepped elsewhere is read from the file for a while.
"""

from __future__ import annotations

from dataclasses import replace

from actserve.server.access.tokens import Token
from actserve.server.sessions.session import Resumed, Session
from actserve.server.sessions.step_record import StepRecord

MAX_SESSIONS = 4096
MAX_BYTES = 16 << 20  # of records
DISTRUSTED_STEPS = 16  # of a session that another process has stepped

_Key = tuple[str, str | None, int | str | None, str | None]  # policy; id or sequence; name of the token


class RecentSessions:
    """Entries are used for `idle_ms` after their step. The oldest ones make room."""

    def __init__(self, idle_ms: int) -> None:
        self._idle_ms = idle_ms
        self._found: dict[_Key, tuple[Resumed, int]] = {}  # with the time of the last step; the oldest first
        self._bytes = 0
        self._distrusted: dict[_Key, int] = {}  # for how many more steps the file is read

    def get(
        self, policy: str, id_: str | None, sequence: int | str | None, holder: Token | None, now_ms: int
    ) -> Resumed | None:
        """The session with this id, or of this sequence, after its last step here; None if it is not known."""
        key = _key(policy, id_, sequence, holder)
        if self._distrusted and (left := self._distrusted.pop(key, 0)):
            if left > 1:
                self._distrusted[key] = left - 1
            return None
        found, stepped_ms = self._found.get(key, (None, 0))
        if found is None or now_ms - stepped_ms >= self._idle_ms:
            return None
        session, last = found
        return found if session.holder is holder else Resumed(replace(session, holder=holder), last)

    def add(self, session: Session, last: StepRecord, now_ms: int) -> None:
        self.forget(session)
        self._found[_key_of(session)] = Resumed(session, last), now_ms
        self._bytes += last.size_bytes
        while len(self._found) > MAX_SESSIONS or self._bytes > MAX_BYTES:
            self.forget(next(iter(self._found.values()))[0].session)

    def distrust(self, session: Session) -> None:
        """Another process has stepped or ended the session."""
        self.forget(session)
        if len(self._distrusted) >= MAX_SESSIONS:
            self._distrusted.clear()
        self._distrusted[_key_of(session)] = DISTRUSTED_STEPS

    def forget(self, session: Session) -> None:
        known, _ = self._found.pop(_key_of(session), (None, 0))
        if known is not None:
            self._bytes -= known.last.size_bytes


def _key_of(session: Session) -> _Key:
    id_ = session.id if session.sequence is None else None
    return _key(session.policy, id_, session.sequence, session.holder)


def _key(policy: str, id_: str | None, sequence: int | str | None, holder: Token | None) -> _Key:
    return policy, id_, sequence, None if holder is None else holder.name
