"""StepWriter: writes the steps of sessions, those of one batch in one transaction.

A transaction takes locks, and writes every page that it changes. For the steps of a batch of 8 that is a third of what
8 transactions cost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

from actserve.core.errors import ActserveError, SessionsUnavailable
from actserve.server.sessions.recent_sessions import RecentSessions
from actserve.server.sessions.room import Room
from actserve.server.sessions.session import Session
from actserve.server.sessions.session_file import SessionFile
from actserve.server.sessions.step_record import StepRecord

log = logging.getLogger("actserve")

Result = TypeVar("Result")

_COLUMNS = "used_ms = ?, step = ?, seeded = ?, checksum = ?, answer = ?, state = ?"
_WHERE = "WHERE number = ? AND step = ?"


class StepChange(NamedTuple):
    """A step of `session`: its record `last` is to be replaced by `new`."""

    session: Session
    last: StepRecord
    new: StepRecord

    @property
    def keeps_size(self) -> bool:
        return self.new.size_bytes == self.last.size_bytes


Written = Callable[[bool | ActserveError], None]
"""Called with what `StepWriter.write` would have returned or raised."""


class StepWriter:
    """Writes into `file`, and keeps the sessions in `recent` up to date."""

    def __init__(self, file: SessionFile, room: Room, recent: RecentSessions) -> None:
        self._file, self._room, self._recent = file, room, recent
        self._waiting: list[tuple[StepChange, Written]] = []

    def write(self, change: StepChange) -> bool:
        """Write a step. False if another request has taken it, or the session has ended.

        Raises `SessionTooLarge`, `SessionsLocked` or `SessionsUnavailable`.
        """
        now_ms = self._room.now_ms
        if change.keeps_size:
            written = self._update(change, now_ms)
        else:
            with self._file.transaction():
                written = self._update(change, now_ms)
                self._room.make(change.session.number, change.session.holder)
        self._remember(change, written, now_ms)
        return written

    def write_soon(self, change: StepChange, written: Written) -> None:
        """Write a step with the others that are given before the event loop's next turn, then call `written`."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._write_waiting)
        self._waiting.append((change, written))

    def _write_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        together = [each for each in waiting if each[0].keeps_size]
        if len(together) > 1:
            self._write_together(together)
            waiting = [each for each in waiting if not each[0].keeps_size]
        for change, written in waiting:
            written(_attempt(partial(self.write, change)))

    def _write_together(self, waiting: list[tuple[StepChange, Written]]) -> None:
        """Write steps after which their sessions have the same size as before."""
        now_ms = self._room.now_ms

        def write_all() -> list[bool]:
            with self._file.transaction():
                return [self._update(change, now_ms) for change, _ in waiting]

        results = _attempt(write_all)
        for index, (change, written) in enumerate(waiting):
            if isinstance(results, ActserveError):
                written(results)
            else:
                self._remember(change, results[index], now_ms)
                written(results[index])

    def _update(self, change: StepChange, now_ms: int) -> bool:
        session, last, new = change
        columns, size = (_COLUMNS, ()) if change.keeps_size else (f"{_COLUMNS}, bytes = ?", (new.size_bytes,))
        values = (now_ms, new.step, new.seeded, new.checksum(session.number), new.answer, new.state, *size)
        return self._file.change(f"UPDATE session SET {columns} {_WHERE}", *values, session.number, last.step) > 0

    def _remember(self, change: StepChange, written: bool, now_ms: int) -> None:
        if written:
            self._recent.add(change.session, change.new, now_ms)
        else:
            self._recent.distrust(change.session)


def _attempt(write: Callable[[], Result]) -> Result | ActserveError:
    """The result of `write`, or why there is none: every step that waits gets an answer."""
    try:
        return write()
    except ActserveError as error:
        return error
    except Exception as error:
        log.exception("steps of sessions could not be written")
        return SessionsUnavailable(f"the step could not be stored ({type(error).__name__}); try again shortly")
