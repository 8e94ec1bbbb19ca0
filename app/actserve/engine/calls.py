"""Calls: which calls of slow programs run now, over all workers of a service.

Every running call holds a shared lock (flock) on one file that all workers open. A call that gets the exclusive lock
first was alone when it began. The kernel releases the locks of a worker that dies.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POLL_S = 0.01


class Calls:
    """The running calls of one policy among those of the service. Only one thread at a time may use it.

    `file` is the file of the service, made if it is missing; None: no other policy or worker counts. Without the locks,
    because the file cannot be opened or its file system has none, no call is alone.
    """

    def __init__(self, file: Path | None) -> None:
        self._counts = file is not None
        self._file: int | None = None
        if file is not None:
            with suppress(OSError):
                # Opened anew for each policy: locks belong to the opened file, so that policies of one process
                # exclude one another too.
                self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextmanager
    def enter(self) -> Iterator[bool]:
        """Count a call as running. Yields whether it is the only one."""
        alone = self._lock(fcntl.LOCK_EX)
        # The others may begin now; they find that they are not alone.
        self._lock(fcntl.LOCK_SH)
        try:
            yield alone
        finally:
            self._unlock()

    @contextmanager
    def exclude(self, wait_s: float, clock: Callable[[], float] = time.monotonic) -> Iterator[bool]:
        """Wait until no call runs, and have none begin as the only one. Yields False if some still ran after `wait_s`.

        The calls of other policies and workers that begin meanwhile run, and are not counted.
        """
        until_s = clock() + wait_s
        while not (alone := self._lock(fcntl.LOCK_EX)) and clock() < until_s:
            time.sleep(POLL_S)
        try:
            yield alone
        finally:
            self._unlock()

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _lock(self, kind: int) -> bool:
        if self._file is None:
            return not self._counts
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except OSError:  # another call has it, or the file system has no locks
            return False
        return True

    def _unlock(self) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
