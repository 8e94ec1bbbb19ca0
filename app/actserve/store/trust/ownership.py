"""Checks that only trusted users could have written a file, as sshd does for its key files."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def untrusted_reason(path: Path) -> str | None:
    """Why a user other than this one and root could change the file at `path`, or None.

    All parent folders are checked, because write access to a folder allows replacing its contents. `path` must be
    resolved. The owner of actserve's own code is trusted as well, because that user can change the running code
    anyway; in a container, this is the owner of a mounted checkout. Raises OSError if `path` does not exist.
    """
    trusted = {0, os.geteuid(), Path(__file__).stat().st_uid}
    for place in (path, *path.parents):
        status = place.lstat()
        if status.st_uid not in trusted:
            return f"its {_kind(place, path)} belongs to another user"
        # In a sticky folder, only the owner of a file can rename or delete it.
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & stat.S_IWOTH and not sticky:
            return f"its {_kind(place, path)} can be written by every user"
        if status.st_mode & stat.S_IWGRP and not sticky and not _is_own_group(status.st_gid, status.st_uid):
            return f"its {_kind(place, path)} can be written by a group"
    return None


def _kind(place: Path, path: Path) -> str:
    return "file" if place == path else "folder, or one above,"


def _is_own_group(group_id: int, owner: int) -> bool:
    """Whether the group has no other member than the owner. Debian and Fedora create such a group for each user."""
    try:
        group, user = grp.getgrgid(group_id), pwd.getpwuid(owner)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
