"""SessionFile: the SQLite file with the sessions of one service, shared by its worker processes.

Rows of one or two kilobytes in pages of 4 KB would waste up to half of each page; pages of 1 KB with overflow pages
waste less than a page for a row of any size. Freed pages are used again, so the limits on sessions bound the file.

`synchronous` is OFF: an fsync would block the event loop for milliseconds, and without it the crash of a process loses
nothing. A crash of the host may leave old or mixed pages. Therefore the file is checked when it is opened, and each row
has a checksum.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actserve.core.errors import SessionsLocked, SessionsUnavailable

log = logging.getLogger("actserve")

FORMAT = 2  # of the tables; files with another format are refused
OPEN_TIMEOUT_S = 5.0  # for a lock, while the file is opened
KEY_BYTES = 32
_SCHEMA = f"""
PRAGMA synchronous = OFF;
PRAGMA page_size = 1024;
PRAGMA journal_mode = WAL;
PRAGMA user_version = {FORMAT};
CREATE TABLE service (key BLOB NOT NULL, sessions INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;
CREATE TABLE session (
    number INTEGER PRIMARY KEY AUTOINCREMENT, -- ascending, which fills pages, and never used twice
    used_ms INTEGER NOT NULL, -- time of the last step or of the start, by the monotonic clock of the host
    step INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0, -- of the answer and the state
    policy TEXT NOT NULL,
    version INTEGER NOT NULL,
    seed INTEGER NOT NULL,
    exploration TEXT,
    by_action INTEGER NOT NULL DEFAULT 0, -- whether chunks are handed out action by action
    owner BLOB, -- a digest, as is sequence
    sequence BLOB,
    seeded INTEGER NOT NULL DEFAULT 0, -- whether the last step drew random numbers
    checksum INTEGER NOT NULL DEFAULT 0,
    answer BLOB NOT NULL DEFAULT x'', -- the large columns come last
    state BLOB NOT NULL DEFAULT x''
) STRICT;
CREATE INDEX by_use ON session (used_ms);
CREATE INDEX by_owner ON session (owner) WHERE owner IS NOT NULL;
CREATE UNIQUE INDEX by_sequence ON session (sequence) WHERE sequence IS NOT NULL;
CREATE TRIGGER begun AFTER INSERT ON session BEGIN
    UPDATE service SET sessions = sessions + 1, bytes = bytes + new.bytes;
END;
CREATE TRIGGER grown AFTER UPDATE OF bytes ON session BEGIN
    UPDATE service SET bytes = bytes + new.bytes - old.bytes;
END;
CREATE TRIGGER gone AFTER DELETE ON session BEGIN
    UPDATE service SET sessions = sessions - 1, bytes = bytes - old.bytes;
END;
"""


class SessionFile:
    """A connection to the file at `path`, which is created if missing.

    All methods raise `SessionsUnavailable` for errors of SQLite or the disk. None waits for a lock of another process,
    once `never_wait` was called: they raise `SessionsLocked`, and have changed nothing. The numbers of new sessions are
    greater than `after`.
    """

    def __init__(self, path: Path, after: int = 0) -> None:
        self.path = path
        self._after = after
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        try:
            if not self.path.exists():
                _create(self.path)
            self._connection = sqlite3.connect(
                self.path, timeout=OPEN_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise _translated(error) from error
        except OSError as error:
            raise SessionsUnavailable(f"the sessions file cannot be created: {error.strerror}") from error
        try:
            self.rows("PRAGMA synchronous = OFF")
            self._check()
            self.change(
                "UPDATE sqlite_sequence SET seq = ? WHERE name = 'session' AND seq < ?", self._after, self._after
            )
        except BaseException:
            self.close()
            raise

    def never_wait(self) -> None:
        """To be called before the event loop uses the file: another process that holds the lock may be frozen."""
        self.rows("PRAGMA busy_timeout = 0")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def rows(self, statement: str, *values: Any) -> list[Any]:
        """The rows of a query."""
        try:
            return self._open_connection().execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise _translated(error) from error

    def change(self, statement: str, *values: Any) -> int:
        """The number of rows that an INSERT, UPDATE or DELETE changed."""
        try:
            return self._open_connection().execute(statement, values).rowcount
        except sqlite3.Error as error:
            raise _translated(error) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits the changes of the block, or none of them if it raises."""
        self.rows("BEGIN IMMEDIATE")
        try:
            yield
            self.rows("COMMIT")
        finally:
            if self._open_connection().in_transaction:  # a full disk may have ended it already
                self.rows("ROLLBACK")

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise SessionsUnavailable("sessions are closed; try again shortly")
        return self._connection

    def _check(self) -> None:
        ((found,),) = self.rows("PRAGMA user_version")
        if found != FORMAT:
            raise SessionsUnavailable(
                f"{self.path.name} has format {found} and this actserve reads {FORMAT}: move the file away"
            )
        ((problem,),) = self.rows("PRAGMA quick_check(1)")
        if problem != "ok":
            raise SessionsUnavailable(f"{self.path.name} is damaged: move it away to start a new file")


def _create(path: Path) -> None:
    """Create the file in full, then link it to `path`: if several workers try, one succeeds."""
    descriptor, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)  # readable only by its owner
    os.close(descriptor)
    try:
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.executescript(_SCHEMA)
            connection.execute("INSERT INTO service VALUES (?, 0, 0)", (secrets.token_bytes(KEY_BYTES),))
            connection.execute("INSERT INTO sqlite_sequence VALUES ('session', 0)")
        finally:
            connection.close()
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        os.unlink(temporary)


def _translated(error: sqlite3.Error) -> SessionsUnavailable:
    # Errors of Python's own module have no code.
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
        return SessionsLocked("another process holds the sessions file; try again shortly")
    log.error("sessions: %s", error)
    return SessionsUnavailable(f"the sessions file cannot be used: {error}")
