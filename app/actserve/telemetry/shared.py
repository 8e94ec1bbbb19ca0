"""Shared: the file in which the worker processes of one service add up what they counted.

A scrape reaches one worker, and wants all. Each writes its own samples once a second, and before it answers a scrape;
what it answers is the sum of what is in the file. So a counter never goes back, whoever is asked, and what a worker
counted outlives it, but for its last second if it was killed. prometheus_client's multiprocess mode does the same with
an mmap'ed write at every increment; here an increment is an integer's.
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

FRESH_S = 5.0  # a worker that has not written for so long is stuck, and its gauges say nothing
_BUSY_S = 5.0
_GONE = ""  # the row of all that have ended
_SCHEMA = "CREATE TABLE IF NOT EXISTS worker (token TEXT PRIMARY KEY, pid INTEGER, at REAL, families BLOB)"
_WRITE = "INSERT OR REPLACE INTO worker VALUES (?, ?, ?, ?)"


class Shared:
    """One worker's way to the file. All methods block, for a millisecond or so; they raise `sqlite3.Error`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = secrets.token_hex(8)  # a process id may be used again

    def open(self) -> None:
        """Make the file, unless it is there; put together what those counted that have ended."""
        with self._transaction() as file:
            file.execute(_SCHEMA)
            ended = [(token, families) for token, pid, _, families in _rows(file) if not _alive(pid)]
            past = merged([], [families for _, families in ended])
            file.executemany("DELETE FROM worker WHERE token = ?", [(token,) for token, _ in ended])
            file.execute(_WRITE, (_GONE, 0, 0.0, _packed(past)))

    def write(self, families: Families) -> None:
        """What this worker has counted until now."""
        with self._transaction() as file:
            file.execute(_WRITE, (self._token, os.getpid(), time.time(), _packed(families)))

    def read(self) -> Families:
        """What all have."""
        with self._transaction() as file:
            rows = list(_rows(file))
        since = time.time() - FRESH_S
        living = [families for _, pid, at, families in rows if at > since and _alive(pid)]
        gone = [families for _, pid, at, families in rows if not (at > since and _alive(pid))]
        return merged(living, gone)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)) as file:
            file.execute("PRAGMA synchronous = OFF")  # nobody needs the counts after the machine has gone down
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
    except OSError:  # there is none; or it is somebody else's
        return False
    return True
