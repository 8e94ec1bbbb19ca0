"""CountsFile: the SQLite file in which the worker processes of one service share their metrics.

A scrape reaches one worker and must return the sum over all. Each worker writes its own samples once a second and
before it answers a scrape; the answer is the sum over the file. So counters never decrease, no matter which worker
answers, and the counts of an ended worker are kept. A killed worker loses at most its last second.

prometheus_client's multiprocess mode writes to an mmap at every increment; here an increment only changes an integer.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pydantic_core

from actserve.telemetry.families import Families, from_jsonable, merged, to_jsonable

FRESH_S = 5.0  # a worker that has not written for longer is stuck: its gauges are ignored
_BUSY_S = 2.0  # a write takes a millisecond
_ENDED = ""  # token of the row that sums all ended workers
_SCHEMA = "CREATE TABLE IF NOT EXISTS worker (token TEXT PRIMARY KEY, pid INTEGER, at REAL, families BLOB)"
_WRITE = "INSERT OR REPLACE INTO worker VALUES (?, ?, ?, ?)"


class CountsFile:
    """One worker's access to the file. All methods block for about a millisecond, and raise `sqlite3.Error`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = secrets.token_hex(8)  # process ids are reused

    def open(self) -> None:
        """Create the file if needed, and merge the rows of ended workers into one."""
        with self._transaction() as file:
            file.execute(_SCHEMA)
            ended = [(token, families) for token, pid, _, families in _rows(file) if not _alive(pid)]
            total = merged([], [families for _, families in ended])
            file.executemany("DELETE FROM worker WHERE token = ?", [(token,) for token, _ in ended])
            file.execute(_WRITE, (_ENDED, 0, 0.0, _packed(total)))

    def write(self, families: Families) -> None:
        """Replace this worker's row."""
        with self._transaction() as file:
            file.execute(_WRITE, (self._token, os.getpid(), time.time(), _packed(families)))

    def read(self) -> Families:
        """The merged metrics of all workers."""
        with self._transaction() as file:
            rows = list(_rows(file))
        since = time.time() - FRESH_S
        running = [families for _, pid, at, families in rows if at > since and _alive(pid)]
        ended = [families for _, pid, at, families in rows if not (at > since and _alive(pid))]
        return merged(running, ended)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)) as file:
            file.execute("PRAGMA synchronous = OFF")  # counts need not survive a crash of the machine
            file.execute("BEGIN IMMEDIATE")
            yield file
            file.execute("COMMIT")


def _rows(file: sqlite3.Connection) -> Iterator[tuple[str, int, float, Families]]:
    for token, pid, at, packed in file.execute("SELECT * FROM worker").fetchall():
        yield token, pid, at, from_jsonable(pydantic_core.from_json(packed))


def _packed(families: Families) -> bytes:
    return pydantic_core.to_json(to_jsonable(families))


def _alive(pid: int) -> bool:
    if pid == 0:
        return False
    try:
        os.kill(pid, 0)
    except OSError:  # no such process, or another user's
        return False
    return True
