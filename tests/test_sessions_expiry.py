"""How long a session is kept: idle sessions are removed, and the oldest ones when the store is full."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from actserve.core.errors import SessionExpired, SessionTooLarge
from actserve.core.settings import Settings
from actserve.server.sessions import SessionLimits, Sessions
from tests.clock import Clock
from tests.fake_policy import NAME, RECORD_BYTES, Versions, seen
from tests.sessions import run


def test_a_gone_session_is_told_from_one_that_never_was(sessions_file: Path, clock: Clock) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits(sessions=2, idle_s=60), clock) as sessions:
            ended, evicted, idle = (sessions.begin(NAME, 1) for _ in range(3))
            assert sessions.statistics().sessions == 2
            with pytest.raises(SessionExpired):
                sessions.get(NAME, ended.id)  # the first of three made room for the third
            sessions.end(evicted)
            sessions.end(evicted)
            clock.now_s += 59.9
            assert sessions.get(NAME, idle.id).idle_s == pytest.approx(59.9)
            clock.now_s += 1.2
            for session in (ended, evicted, idle):
                with pytest.raises(SessionExpired, match="begin a new one"):
                    sessions.get(NAME, session.id)
                with pytest.raises(SessionExpired):
                    await sessions.step(registry, session, seen(1))
            assert sessions.statistics().sessions == 0

    run(scenario)


def test_who_was_idle_for_longest_makes_room(sessions_file: Path, clock: Clock) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits(bytes=3 * RECORD_BYTES), clock) as sessions:
            begun = [sessions.begin(NAME, 1) for _ in range(4)]
            for session in (begun[2], begun[0], begun[1]):
                clock.now_s += 1
                await sessions.step(registry, session, seen(1))
            assert sessions.statistics().bytes == 3 * RECORD_BYTES
            clock.now_s += 1
            await sessions.step(registry, begun[3], seen(1))
            with pytest.raises(SessionExpired):
                sessions.get(NAME, begun[2].id)
            for session in (begun[0], begun[1], begun[3]):
                assert sessions.get(NAME, session.id).step == 1
            assert sessions.statistics().bytes == 3 * RECORD_BYTES

    run(scenario)


def test_a_session_larger_than_all_may_be_is_refused_and_does_not_move(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits(bytes=RECORD_BYTES - 1)) as sessions:
            session = sessions.begin(NAME, 1)
            other = sessions.begin(NAME, 1)
            with pytest.raises(SessionTooLarge, match="may have 32 bytes of state and answers; this one has 33"):
                await sessions.step(registry, session, seen(1))
            assert sessions.get(NAME, session.id).step == 0
            assert sessions.get(NAME, other.id).step == 0

    run(scenario)


def test_settings_have_the_limits() -> None:
    settings = Settings()
    assert SessionLimits(settings.max_sessions, settings.max_session_bytes, settings.session_idle_s) == SessionLimits()


def test_the_wall_clock_may_be_set_back(sessions_file: Path, clock: Clock) -> None:
    with Sessions(sessions_file, SessionLimits(idle_s=60), clock) as sessions:
        session = sessions.begin(NAME, 1)
        clock.now_s -= 3600
        assert sessions.get(NAME, session.id).idle_s == 0


def test_a_clock_that_is_set_ends_no_session(sessions_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            session = sessions.begin(NAME, 1)
            await sessions.step(registry, session, seen(1))
            for hours in (5, -50, 5000):
                set_to = time.time() + hours * 3600
                monkeypatch.setattr("time.time", lambda: set_to)  # noqa: B023, it is called at once
                assert sessions.get(NAME, session.id).idle_s < 60
            stepped = await sessions.step(registry, sessions.get(NAME, session.id), seen(1), 2)
            assert stepped.step == 2

    run(scenario)


def test_sessions_outlive_a_host_that_begins_anew(sessions_file: Path) -> None:
    """The clock of the host begins again, too."""
    before, after = Clock(), Clock()
    after.now_s = 5.0
    with Sessions(sessions_file, SessionLimits(), before) as sessions:
        session = sessions.begin(NAME, 1)
    with Sessions(sessions_file, SessionLimits(idle_s=600), after) as sessions:
        assert sessions.get(NAME, session.id).idle_s == 0
        after.now_s += 601
        with pytest.raises(SessionExpired):
            sessions.get(NAME, session.id)
