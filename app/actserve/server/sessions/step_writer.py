"""StepWriter: writes the steps of sessions, those of one batch in one transaction.

A transaction takes locks, and writes every page that it changes. For the steps of a batch of 8 that is a third of what
8 transactions cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from actserve.core.errors import ActserveError
from actserve.server.sessions.recent_sessions import RecentSessions
from actserve.server.sessions.room import Room
from actserve.server.sessions.session import Session
from actserve.server.sessions.session_file import SessionFile
from actserve.server.sessions.step_record import StepRecord

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
            try:
                result: bool | ActserveError = self.write(change)
            except ActserveError as error:
                result = error
            written(result)

    def _write_together(self, waiting: list[tuple[StepChange, Written]]) -> None:
        """Write steps after which their sessions have the same size as before."""
        now_ms = self._room.now_ms
        results: list[bool | ActserveError]
        try:
            with self._file.transaction():
                results = [self._update(change, now_ms) for change, _ in waiting]
        except ActserveError as error:
            results = [error] * len(waiting)
        for (change, written), result in zip(waiting, results, strict=True):
            if isinstance(result, bool):
                self._remember(change, result, now_ms)
            written(result)

    def _update(self, change: StepChange, now_ms: int) -> bool:
        (session, last, new), number = change, change.session.number
        columns, size = (_COLUMNS, ()) if change.keeps_size else (f"{_COLUMNS}, bytes = ?", (new.size_bytes,))
        values = (now_ms, new.step, new.seeded, new.checksum(number), new.answer, new.state, *size)
        return self._file.change(f"UPDATE session SET {columns} {_WHERE}", *values, session.number, last.step) > 0

    def _remember(self, change: StepChange, written: bool, now_ms: int) -> None:
        if written:
            self._recent.add(change.session, change.new, now_ms)
        else:
            self._recent.forget(change.session)
