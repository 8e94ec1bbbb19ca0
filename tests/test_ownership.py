from __future__ import annotations

import os
from pathlib import Path

import pytest

from actserve.store.trust.ownership import untrusted_reason

SOMEBODY = 4242  # no user and no group of this host


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"")
    for path in (folder / "file", folder, folder.parent):
        path.chmod(0o755)
    return folder / "file"


def test_what_only_this_user_can_change_is_its_own(file: Path) -> None:
    assert untrusted_reason(file) is None


@pytest.mark.parametrize(
    ("above", "mode", "reason"),
    [
        (0, 0o646, "its file can be written by every user"),
        (1, 0o757, "its folder, or one above, can be written by every user"),
        (2, 0o757, "its folder, or one above, can be written by every user"),
        (2, 0o1777, None),  # as /tmp: others can add to it, and take nothing away
    ],
)
def test_others_may_not_write_anywhere_above(file: Path, above: int, mode: int, reason: str | None) -> None:
    [file, *file.parents][above].chmod(mode)
    assert untrusted_reason(file) == reason


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_group_may_not_either_unless_nobody_else_is_in_it(file: Path) -> None:
    file.parent.chmod(0o775)
    assert untrusted_reason(file) is None, "the group of its owner's name"
    os.chown(file.parent, -1, SOMEBODY)
    assert untrusted_reason(file) == "its folder, or one above, can be written by a group"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("above", [0, 1, 2])
def test_another_users_is_not_ones_own(file: Path, above: int) -> None:
    os.chown([file, *file.parents][above], SOMEBODY, -1)
    reason = untrusted_reason(file)
    assert reason is not None
    assert reason.endswith("belongs to another user")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        untrusted_reason(tmp_path / "nowhere")
