"""RecentSessions: the sessions that this process stepped last, so that their next step needs no reading.

An entry can be out of date: another process may have stepped or ended the session. Then the next `Sessions.write` of
this process returns False.
"""

from __future__ import annotations

from dataclasses import replace

from actserve.server.access.tokens import Token
from actserve.server.sessions.session import Session

MAX_SESSIONS = 4096
MAX_BYTES = 16 << 20  # of records

_Key = tuple[str, str | None, int | str | None, str | None]  # policy; id or sequence; name of the token


class RecentSessions:
    """Entries are used for `idle_ms` after their step. The oldest ones make room."""

    def __init__(self, idle_ms: int) -> None:
        self._idle_ms = idle_ms
        self._found: dict[_Key, tuple[Session, int]] = {}  # the session, and the time of its step; the oldest first
        self._bytes = 0

    def get(
        self, policy: str, id_: str | None, sequence: int | str | None, holder: Token | None, now_ms: int
    ) -> Session | None:
        """The session with this id, or of this sequence, after its last step here, which is `last`; None if it is not
        known."""
        session, stepped_ms = self._found.get(_key(policy, id_, sequence, holder), (None, 0))
        if session is None or now_ms - stepped_ms >= self._idle_ms:
            return None
        return session if session.holder is holder else replace(session, holder=holder)

    def add(self, session: Session, now_ms: int) -> None:
        assert session.last is not None
        self.forget(session)
        self._found[_key_of(session)] = session, now_ms
        self._bytes += session.last.size_bytes
        while len(self._found) > MAX_SESSIONS or self._bytes > MAX_BYTES:
            self.forget(next(iter(self._found.values()))[0])

    def forget(self, session: Session) -> None:
        known, _ = self._found.pop(_key_of(session), (None, 0))
        if known is not None and known.last is not None:
            self._bytes -= known.last.size_bytes


def _key_of(session: Session) -> _Key:
    id_ = session.id if session.sequence is None else None
    return _key(session.policy, id_, session.sequence, session.holder)


def _key(policy: str, id_: str | None, sequence: int | str | None, holder: Token | None) -> _Key:
    return policy, id_, sequence, None if holder is None else holder.name
