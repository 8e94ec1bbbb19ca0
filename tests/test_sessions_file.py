"""The sessions' file: its contents, restarts, and errors when it cannot be used."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from actserve.core.errors import SessionExpired, SessionsUnavailable
from actserve.server.sessions import SessionLimits, Sessions
from tests.clock import Clock
from tests.fake_policy import NAME, Versions, same, seen
from tests.sessions import alone, run


def test_secrets_of_owners_are_not_in_the_file(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions:
        session = sessions.begin(NAME, 1, owner="a-secret-of-mine", sequence="a-name-of-mine")
        content = b"".join(file.read_bytes() for file in sessions_file.parent.iterdir())
        for secret in (b"a-secret-of-mine", b"a-name-of-mine", session.id.encode()):
            assert secret not in content
        assert sessions_file.stat().st_mode & 0o077 == 0


def test_sessions_outlive_a_restart(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            session = sessions.begin(NAME, 1, seed=3, exploration="random", owner="me")
            first = await sessions.step(registry, session, seen(4), 1)
        with Sessions(sessions_file, SessionLimits()) as sessions:
            (found,) = sessions.owned(NAME, "me")
            assert found == replace(session, step=1, idle_s=found.idle_s)
            again = await sessions.step(registry, session, seen(4), 1)
            assert same(again.acted.outputs, first.acted.outputs)
            second = await sessions.step(registry, session, seen(5), 2)
            expected = alone(session)
            expected.take(seen(4))
            assert same(second.acted.outputs, expected.take(seen(5)))

    run(scenario)


def test_the_file_does_not_grow_with_the_sessions_that_come_and_go(sessions_file: Path, clock: Clock) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits(sessions=200, idle_s=60), clock) as sessions:

            async def generation() -> int:
                for _ in range(250):
                    await sessions.step(registry, sessions.begin(NAME, 1), seen(1))
                clock.now_s += 100
                sessions.statistics()
                return sum(file.stat().st_size for file in sessions_file.parent.iterdir())

            sizes = [await generation() for _ in range(12)]
            assert max(sizes[6:]) <= max(sizes[:6])

    run(scenario)


def test_a_damaged_record_is_forgotten_rather_than_used(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            session, other = sessions.begin(NAME, 1), sessions.begin(NAME, 1)
            await sessions.step(registry, session, seen(1))
            await sessions.step(registry, other, seen(2))
            with sqlite3.connect(sessions_file) as file:
                file.execute("UPDATE session SET state = (SELECT state FROM session WHERE number = 2) WHERE number = 1")
            file.close()
            with pytest.raises(SessionExpired):
                await sessions.step(registry, session, seen(1))
            await sessions.step(registry, other, seen(2))

    run(scenario)


@pytest.mark.parametrize("content", [b"this is not a database, and long enough to see it" * 30, b"SQLite format 3\0"])
def test_a_file_of_something_else_is_refused(sessions_file: Path, content: bytes) -> None:
    sessions_file.write_bytes(content)
    with (
        pytest.raises(SessionsUnavailable, match=r"cannot be used|has format 0"),
        Sessions(sessions_file, SessionLimits()),
    ):
        pass
    assert sessions_file.read_bytes() == content


def test_a_damaged_file_and_a_newer_one_are_refused(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions:
        for _ in range(100):
            sessions.begin(NAME, 1)
    content = bytearray(sessions_file.read_bytes())
    content[3072:] = bytes(len(content) - 3072)
    sessions_file.write_bytes(content)
    with pytest.raises(SessionsUnavailable, match=r"damaged|malformed"), Sessions(sessions_file, SessionLimits()):
        pass
    sessions_file.unlink()
    with Sessions(sessions_file, SessionLimits()):
        pass
    with sqlite3.connect(sessions_file) as file:
        file.execute("PRAGMA user_version = 3")
    file.close()
    with (
        pytest.raises(SessionsUnavailable, match="format 3 and this actserve reads 2"),
        Sessions(sessions_file, SessionLimits()),
    ):
        pass


def test_no_folder_no_sessions(tmp_path: Path) -> None:
    with (
        pytest.raises(SessionsUnavailable, match="cannot be created: No such file"),
        Sessions(tmp_path / "no" / "x", SessionLimits()),
    ):
        pass


def test_a_full_disk_fails_the_step_and_not_the_session(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            session = sessions.begin(NAME, 1)
            ((pages,),) = sessions._file.rows("PRAGMA page_count")
            sessions._file.rows(f"PRAGMA max_page_count = {pages}")
            with pytest.raises(SessionsUnavailable, match="full"):
                [sessions.begin(NAME, 1) for _ in range(100)]
            sessions._file.rows("PRAGMA max_page_count = 100000")
            await sessions.step(registry, session, seen(1), 1)

    run(scenario)


def test_closed_sessions_say_so(sessions_file: Path) -> None:
    sessions = Sessions(sessions_file, SessionLimits())
    with pytest.raises(SessionsUnavailable, match="closed"):
        sessions.begin(NAME, 1)
