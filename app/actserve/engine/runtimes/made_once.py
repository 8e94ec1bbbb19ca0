"""MadeOnce: a folder of files that the first of several processes makes, and the others use."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


class MadeOnce:
    """The folder `parent`/`name`, in use until `close`. The last process that closes it deletes it.

    `make` fills a new folder. Other processes that want the folder wait meanwhile. Each user holds a shared lock
    (flock), which the kernel releases if the process dies. Raises OSError, and what `make` raises.
    """

    def __init__(self, parent: Path, name: str, make: Callable[[Path], None]) -> None:
        self.folder = parent / name
        self._lock = os.open(parent / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            while not self.folder.is_dir():
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                if not self.folder.is_dir():
                    self._make(make)
                fcntl.flock(self._lock, fcntl.LOCK_SH)  # not in one step: another process may have deleted the folder
        except BaseException:
            os.close(self._lock)
            raise

    def _make(self, make: Callable[[Path], None]) -> None:
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=self.folder.parent))
        try:
            make(staging)
            staging.rename(self.folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # does not exist after the rename

    def close(self) -> None:
        """Delete the folder if no other process uses it. Files of it that are mapped stay mapped."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
        except OSError:  # in use
            pass
        finally:
            os.close(self._lock)
