"""Steps that are written together: what happens to one of them changes nothing for the others."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from actserve.core.errors import ActserveError, SessionExpired, SessionsLocked, SessionsUnavailable, SessionTooLarge
from actserve.server.sessions import Session, SessionLimits, Sessions
from actserve.server.sessions.recent_sessions import DISTRUSTED_STEPS
from actserve.server.sessions.step_record import StepRecord
from actserve.server.sessions.step_writer import StepChange
from tests.fake_policy import NAME

NOTHING = StepRecord(0, False, b"", b"")
Result = bool | ActserveError


def record(step: int, size: int = 8) -> StepRecord:
    return StepRecord(step, False, b"a" * size, bytes([step]) * size)


def begun(sessions: Sessions, count: int) -> list[Session]:
    """Sessions that have taken one step."""
    found = [sessions.begin(NAME, 1) for _ in range(count)]
    for session in found:
        assert sessions.writer.write(StepChange(session, NOTHING, record(1)))
    return found


def written(sessions: Sessions, changes: Sequence[StepChange]) -> list[Result]:
    """The results of steps that are given in one turn of an event loop."""

    async def main() -> list[Result]:
        results: dict[int, Result] = {}

        def remember(index: int) -> Callable[[Result], None]:
            return lambda result: results.update({index: result})

        for index, change in enumerate(changes):
            sessions.writer.write_soon(change, remember(index))
        assert not results
        await asyncio.sleep(0)
        return [results[index] for index in range(len(changes))]

    return asyncio.run(main())


def seconds(found: Sequence[Session]) -> list[StepChange]:
    return [StepChange(session, record(1), record(2)) for session in found]


def stored(sessions: Sessions, session: Session) -> StepRecord:
    return sessions.resume(NAME, session.id).last


@pytest.mark.parametrize("count", [1, 2, 33])
def test_all_are_stored_and_remembered(sessions_file: Path, count: int) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions, Sessions(sessions_file, SessionLimits()) as others:
        found = begun(sessions, count)
        assert written(sessions, seconds(found)) == [True] * count
        for session in found:
            recent = sessions.recent(NAME, session.id)
            assert recent is not None
            assert recent.last == stored(others, session) == record(2)


def test_several_take_one_transaction(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions:
        found = begun(sessions, 5)
        assert sessions._file._connection is not None
        statements: list[str] = []
        sessions._file._connection.set_trace_callback(statements.append)
        assert written(sessions, seconds(found)) == [True] * 5
        assert [statement.split()[0] for statement in statements] == ["BEGIN", *["UPDATE"] * 5, "COMMIT"]


def test_a_step_that_another_process_took_is_the_only_one_that_is_not_stored(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions, Sessions(sessions_file, SessionLimits()) as others:
        first, taken, ended, last = found = begun(sessions, 4)
        assert others.writer.write(StepChange(taken, record(1), StepRecord(2, True, b"b" * 8, b"c" * 8)))
        others.end(ended)
        assert written(sessions, seconds(found)) == [True, False, False, True]
        assert sessions.recent(NAME, taken.id) is None
        assert stored(sessions, taken).answer == b"b" * 8
        with pytest.raises(SessionExpired):
            sessions.resume(NAME, ended.id)
        assert stored(sessions, first) == stored(sessions, last) == record(2)


def test_a_session_that_another_process_steps_too_is_read_for_a_while(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions, Sessions(sessions_file, SessionLimits()) as others:
        shared, own = begun(sessions, 2)

        def take(by: Sessions) -> bool:
            found, last = by.recent(NAME, shared.id) or by.resume(NAME, shared.id)
            return by.writer.write(StepChange(found, last, record(last.step + 1)))

        assert take(others)
        assert not take(sessions), "it did not know of the other's step"
        taken = [take(by) for _ in range(DISTRUSTED_STEPS) for by in (sessions, others)]
        assert taken.count(False) == 1, "the other learned it, too"
        assert stored(sessions, shared).step == 2 + taken.count(True)
        assert sessions.recent(NAME, shared.id) is not None, "trusted again"
        assert sessions.recent(NAME, own.id) is not None


def test_of_two_that_take_the_same_step_the_first_one_does(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions:
        (session,) = begun(sessions, 1)
        twice = [StepChange(session, record(1), StepRecord(2, False, answer * 8, b"s" * 8)) for answer in (b"x", b"y")]
        assert written(sessions, twice) == [True, False]
        assert stored(sessions, session).answer == b"x" * 8


def test_while_another_process_holds_the_file_none_is_stored(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions:
        found = begun(sessions, 3)
        lock = sqlite3.connect(sessions_file, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        results = written(sessions, seconds(found))
        lock.close()
        assert all(isinstance(result, SessionsLocked) for result in results)
        assert [stored(sessions, session).step for session in found] == [1, 1, 1]
        assert written(sessions, seconds(found)) == [True] * 3


def test_a_full_disk_stores_none_and_loses_none(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions:
        found = begun(sessions, 3)
        sessions._file.rows("PRAGMA query_only = 1")  # as a disk that takes no more
        results = written(sessions, seconds(found))
        assert all(isinstance(result, SessionsUnavailable) for result in results)
        sessions._file.rows("PRAGMA query_only = 0")
        assert written(sessions, seconds(found)) == [True] * 3


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_of_ours_is_an_answer_too(sessions_file: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    def fail(_: StepRecord, number: int) -> int:
        raise ZeroDivisionError(number)

    with Sessions(sessions_file, SessionLimits()) as sessions:
        found = begun(sessions, count)
        with monkeypatch.context() as broken:
            broken.setattr(StepRecord, "checksum", fail)
            results = written(sessions, seconds(found))
        assert [str(result) for result in results] == [
            "the step could not be stored (ZeroDivisionError); try again shortly"
        ] * count
        assert written(sessions, seconds(found)) == [True] * count


def test_a_session_that_grows_too_large_fails_alone(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits(bytes=400)) as sessions:
        large, *others = begun(sessions, 3)
        results = written(sessions, [StepChange(large, record(1), record(2, 500)), *seconds(others)])
        assert isinstance(results[0], SessionTooLarge)
        assert results[1:] == [True, True]
        assert stored(sessions, large) == record(1)
        assert stored(sessions, others[0]) == record(2)
