"""Who could have put a file where it is, as sshd asks of the keys that it trusts."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def meddler(path: Path) -> str | None:
    """Why somebody else than this user and root could change what is at `path`, or None.

    Every folder above counts, for whoever may write to it can put another one in its place. `path` is resolved:
    without symbolic links. This user includes the owner of this very code, who can change what runs here anyway: in a
    container, that is who owns a mounted checkout. Raises OSError for what is not there.
    """
    trusted = {0, os.geteuid(), Path(__file__).stat().st_uid}
    for place in (path, *path.parents):
        status = place.lstat()
        if status.st_uid not in trusted:
            return f"its {_kind(place, path)} belongs to another user"
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX  # what is in it, its owner alone moves
        if status.st_mode & stat.S_IWOTH and not sticky:
            return f"its {_kind(place, path)} can be written by every user"
        if status.st_mode & stat.S_IWGRP and not sticky and not _is_own_group(status.st_gid, status.st_uid):
            return f"its {_kind(place, path)} can be written by a group"
    return None


def _kind(place: Path, path: Path) -> str:
    return "file" if place == path else "folder, or one above,"


def _is_own_group(group_id: int, owner: int) -> bool:
    """Whether the group is its owner's alone, such as Debian and Fedora give to each user."""
    try:
        group, user = grp.getgrgid(group_id), pwd.getpwuid(owner)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
