"""Room: keeps the sessions of a file within their limits: it deletes expired ones, then the ones idle longest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from actserve.core.errors import SessionsLocked, SessionTooLarge
from actserve.server.access.tokens import Token
from actserve.server.sessions.session_file import SessionFile

SWEEP_EVERY_S = 1.0
_SAME_OWNER = "owner = (SELECT owner FROM session WHERE number = ?)"
MAX_SWEPT = 100  # sessions in one sweep, which takes about a millisecond of the event loop


@dataclass(frozen=True)
class SessionLimits:
    """Bounds of the sessions of one service."""

    sessions: int = 10_000
    bytes: int = 256 << 20  # of states and last answers
    idle_s: float = 600.0  # a session expires after so long without a step
    sessions_each: int = 1000  # sessions of one token, unless the token has its own limit


class Room:
    """The limits on the sessions in `file`. `clock` is in seconds."""

    def __init__(self, file: SessionFile, limits: SessionLimits, clock: Callable[[], float]) -> None:
        self._file, self._limits, self._clock = file, limits, clock
        self._swept_s = 0.0

    @property
    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    @property
    def idle_since_ms(self) -> int:
        """A session whose last step was not later than this has expired."""
        return self.now_ms - int(self._limits.idle_s * 1000)

    def sweep(self) -> None:
        """Once a second, delete expired sessions."""
        now = self._clock()
        if 0 <= now - self._swept_s < SWEEP_EVERY_S:
            return
        idle = "(SELECT number FROM session WHERE used_ms <= ? ORDER BY used_ms LIMIT ?)"
        try:
            swept = self._file.change(f"DELETE FROM session WHERE number IN {idle}", self.idle_since_ms, MAX_SWEPT)
        except SessionsLocked:  # a second later, then
            swept = 0
        if swept < MAX_SWEPT:
            self._swept_s = now

    def enforce_token_limit(self, holder: Token, keep: int) -> None:
        """Delete sessions of the token that were idle for longest, but not its session `keep`, down to its limit."""
        ((count,),) = self._file.rows(f"SELECT count(*) FROM session WHERE {_SAME_OWNER}", keep)
        for _ in range(count - (holder.sessions or self._limits.sessions_each)):
            self._delete_oldest(keep, of_its_owner=True)

    def make(self, keep: int, holder: Token | None) -> None:
        """Delete sessions that were idle for longest, but not session `keep` of `holder`, until the others fit.

        Sessions of the holder go first. Raises `SessionTooLarge` if `keep` alone does not fit.
        """
        while True:
            ((count, size),) = self._file.rows("SELECT sessions, bytes FROM service")
            if count <= self._limits.sessions and size <= self._limits.bytes:
                return
            if not ((holder is not None and self._delete_oldest(keep, of_its_owner=True)) or self._delete_oldest(keep)):
                raise SessionTooLarge(self._limits.bytes, size)

    def _delete_oldest(self, keep: int, of_its_owner: bool = False) -> bool:
        """Delete the session, if any, that was idle for longest, but not `keep`."""
        condition, values = (f"AND {_SAME_OWNER}", (keep,)) if of_its_owner else ("", ())
        oldest = f"(SELECT number FROM session WHERE number <> ? {condition} ORDER BY used_ms LIMIT 1)"
        return self._file.change(f"DELETE FROM session WHERE number = {oldest}", keep, *values) > 0
