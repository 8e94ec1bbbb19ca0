"""Writer: the thread that writes a worker's recording.

A shard is written under a temporary name, and renamed when it is complete: after `SHARD_S` or `SHARD_BYTES`. So no
shard is ever torn. A worker that is killed loses its open shards and the rows in its buffer. A writer locks its
temporary files (flock) as long as it lives. At its start, a writer removes the temporary files without a lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

from actserve.core.errors import UsageError
from actserve.recording.recorder import Recorded, Recorder
from actserve.recording.rows import Rows
from actserve.recording.shards import SUFFIX, Header, ShardWriter

log = logging.getLogger("actserve")

POLL_S = 0.25  # between two looks at the buffer
GROUP_BYTES = 4 << 20  # of rows that are compressed at once
SHARD_BYTES = 64 << 20  # of rows, before compression
SHARD_S = 10.0
FREE_BYTES = 256 << 20  # a disk with less is full: other programs need the rest
TEMPORARY = ".recording-"


class DiskFull(Exception):
    """The disk has too little space left."""


class _Open:
    """A shard that is being written."""

    def __init__(self, folder: Path, header: Header, now_s: float) -> None:
        self.until_s = now_s + SHARD_S
        self.rows: list[Rows] = []  # the next group
        self.group_bytes = self.bytes = 0
        self.final = folder / header.file_name
        temporary = folder / f"{TEMPORARY}{header.file_name}"
        self.lock = _locked(temporary)
        try:
            self.shard = ShardWriter(temporary, header)
        except BaseException:
            _remove(temporary, self.lock)
            raise

    def add(self, rows: Rows) -> None:
        self.rows.append(rows)
        self.group_bytes += rows.size_bytes
        self.bytes += rows.size_bytes

    def flush(self) -> list[Rows]:
        """Write the group, and return its rows: their memory is free."""
        rows, self.rows, self.group_bytes = self.rows, [], 0
        if rows:
            self.shard.write(rows)
        return rows


class Writer:
    """Writes what `recorder` buffers into `folder`, which is created. Enter it to start the thread; exit to flush.

    Raises `UsageError` if the folder cannot be written. A later error stops the recording.
    """

    def __init__(
        self,
        recorder: Recorder,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._recorder, self._folder = recorder, folder
        self._clock, self._free_bytes = clock, free_bytes
        self._token = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        self._sequence = 0
        self._open: dict[Recorded, _Open] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)

    def __enter__(self) -> Self:
        prepare(self._folder)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(POLL_S):
            if not self._turn():
                return
        if self._turn():
            self._attempt(self._close_all)

    def _turn(self) -> bool:
        """Write what there is. False if recording has stopped."""
        return self._attempt(self.write)

    def _attempt(self, work: Callable[[], None]) -> bool:
        begun_ns = time.thread_time_ns()
        try:
            work()
        except Exception as error:  # of the disk or of Arrow: it must not end unnoticed
            self._abandon()
            log.error("the recording cannot be written", exc_info=error)
            self._recorder.stop(_reason(error))
            return False
        finally:
            self._recorder.budget.writing_ns += time.thread_time_ns() - begun_ns
        return True

    def write(self) -> None:
        """Write the rows of the buffer, and complete the shards that are old or large enough."""
        buffer = self._recorder.rows
        for _ in range(len(buffer)):
            recorded, rows = buffer.popleft()
            shard = self._shard(recorded)
            shard.add(rows)
            if shard.group_bytes >= GROUP_BYTES:
                self._flush(shard)
            if shard.bytes >= SHARD_BYTES:
                self._close(recorded)
        now_s = self._clock()
        for recorded in [known for known, shard in self._open.items() if now_s >= shard.until_s]:
            self._close(recorded)

    def _shard(self, recorded: Recorded) -> _Open:
        if recorded not in self._open:
            if self._free_bytes(self._folder) < FREE_BYTES:
                raise DiskFull(f"the disk has less than {FREE_BYTES >> 20} MB left")
            header = Header.of(recorded.artifact, recorded.runtime, self._token, self._sequence)
            self._sequence += 1
            self._open[recorded] = _Open(self._folder, header, self._clock())
        return self._open[recorded]

    def _flush(self, shard: _Open) -> None:
        size_bytes = shard.group_bytes
        for rows in shard.flush():
            self._recorder.blocks.give_back(rows.tensors.values())
        self._recorder.budget.written_bytes += size_bytes

    def _close(self, recorded: Recorded) -> None:
        shard = self._open[recorded]
        self._flush(shard)
        shard.shard.close(_taken(recorded.ended), _taken(recorded.feedback))
        os.rename(shard.shard.path, shard.final)
        os.close(shard.lock)
        del self._open[recorded]
        self._recorder.file_bytes += shard.final.stat().st_size

    def _close_all(self) -> None:
        for recorded in [known for known in self._recorder.recorded if known.ended or known.feedback]:
            self._shard(recorded)
        for recorded in list(self._open):
            self._close(recorded)

    def _abandon(self) -> None:
        """Remove the open shards."""
        for shard in self._open.values():
            shard.shard.abandon()
            _remove(shard.shard.path, shard.lock)
        self._open.clear()


T = TypeVar("T")


def _taken(values: dict[str, T]) -> dict[str, T]:
    """Everything in `values`, which the event loop fills meanwhile; it is removed there."""
    return {key: values.pop(key) for key in list(values)}


def prepare(folder: Path) -> None:
    """Create the folder, and remove what writers left that were killed. Raises `UsageError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{TEMPORARY}*{SUFFIX}"):
            _remove_if_left(path)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "permission denied")
    except OSError as error:
        raise UsageError(
            f"expected a folder for the recording that can be written; {folder}: {error.strerror}"
        ) from error


def _locked(path: Path) -> int:
    """Create and lock a file -> its descriptor. Another writer may remove it before it is locked, and not after."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """Why recording has stopped, for clients: messages of Arrow have paths."""
    if isinstance(error, DiskFull):
        return str(error)
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__


def _remove(path: Path, lock: int) -> None:
    with suppress(OSError):
        path.unlink()
    os.close(lock)


def _remove_if_left(path: Path) -> None:
    with suppress(FileNotFoundError, BlockingIOError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            log.info("removed an incomplete shard of a recording: %s", path.name)
        finally:
            os.close(descriptor)
