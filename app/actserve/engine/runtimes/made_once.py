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

    `make` fills a new folder. Other processes that want the folder wait meanwhile. Two locks (flock), which the kernel
    releases if the process dies: every user shares one, and one process at a time has the other while it starts to use
    the folder. Raises OSError, and what `make` raises.
    """

    def __init__(self, parent: Path, name: str, make: Callable[[Path], None]) -> None:
        self.folder = parent / name
        self._users = _opened(parent / f"{name}.users")
        try:
            with os.fdopen(_opened(parent / f"{name}.starting")) as starting:
                fcntl.flock(starting, fcntl.LOCK_EX)
                fcntl.flock(self._users, fcntl.LOCK_SH)  # waits while another process deletes the folder
                if not self.folder.is_dir():
                    self._make(make)
        except BaseException:
            os.close(self._users)
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
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
        except OSError:  # in use
            pass
        finally:
            os.close(self._users)


def _opened(lock: Path) -> int:
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
