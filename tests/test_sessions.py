from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.errors import (
    InvalidRequest,
    InvalidTensor,
    RuntimeFailure,
    SessionElsewhere,
    SessionExpired,
    SessionsUnavailable,
    SessionTooLarge,
    StepConflict,
    UnknownSession,
)
from app.requests import MAX_SEED, step_seed
from app.sessions import Limits, Session, Sessions
from app.sessions.names import home_of
from app.settings import Settings
from app.signature import Array
from app.tuning import Tuning
from tests.fake_policy import NAME, QUICK, RECORD_BYTES, SLOW, Alone, Versions, same, seen


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.sqlite"


def alone(session: Session) -> Alone:
    return Alone(session.version, session.seed, session.exploration)


def run(scenario: Callable[[Versions], Awaitable[None]], tuning: Tuning = QUICK) -> None:
    async def main() -> None:
        registry = Versions(tuning)
        registry.publish()
        try:
            await scenario(registry)
        finally:
            await registry.close()

    asyncio.run(main())


def test_a_session_acts_as_the_policy_alone(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1, seed=5, exploration="random")
            expected = alone(session)
            for number, x in enumerate([3, 1, 4, 1, 5], 1):
                tensors = seen(x, is_init=True if number == 4 else None)
                stepped = await sessions.step(registry, session, tensors, number)
                assert (stepped.step, stepped.replayed) == (number, False)
                assert same(stepped.acted.outputs, expected.take(tensors))
                assert stepped.acted.seed == step_seed(5, number)
            assert sessions.get(NAME, session.id).step == 5

    run(scenario)


def test_a_step_sent_again_gets_the_stored_answer_whatever_it_carries(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1, exploration="random")
            policy = await registry.get(NAME, 1)
            assert sessions.stored(policy, session, 1) is None
            first = await sessions.step(registry, session, seen(1), 1)
            batch = {"x": np.zeros(3, np.int64)}
            for again in (
                await sessions.step(registry, session, seen(999), 1),
                await sessions.step(registry, session, batch, 1),
                sessions.stored(policy, session, 1),
            ):
                assert again is not None
                assert again.replayed
                assert same(again.acted.outputs, first.acted.outputs)
                assert again.acted.seed == first.acted.seed
            assert sessions.get(NAME, session.id).step == 1
            assert registry.runtimes[1].items == 1

    run(scenario)


@pytest.mark.parametrize("step", [0, 1, 4, 10**18])
def test_any_other_step_is_told_what_was_expected(path: Path, step: int) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1)
            for _ in range(2):
                await sessions.step(registry, session, seen(1))
            with pytest.raises(StepConflict, match=rf"expected step 3 \(or 2 again.*\); got {step}") as raised:
                await sessions.step(registry, session, seen(1), step)
            assert raised.value.detail == {"expected": 3, "got": step}
            assert sessions.get(NAME, session.id).step == 2

    run(scenario)


def test_the_first_step_has_no_answer_before_it(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1)
            with pytest.raises(StepConflict, match="expected step 1; got 0"):
                await sessions.step(registry, session, seen(1), 0)

    run(scenario)


def test_duplicates_in_flight_run_on_and_get_one_answer(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as one, Sessions(path, Limits()) as other:
            session = one.begin(NAME, 1, exploration="random")
            workers = [one, other] * 3
            answers = await asyncio.gather(*(w.step(registry, session, seen(8), 1) for w in workers))
            assert sum(not answer.replayed for answer in answers) == 1
            for answer in answers:
                assert same(answer.acted.outputs, answers[0].acted.outputs)
            assert other.get(NAME, session.id).step == 1

    run(scenario)


def test_steps_without_a_number_all_count(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1)
            answers = await asyncio.gather(*(sessions.step(registry, session, seen(5)) for _ in range(6)))
            assert sorted(answer.step for answer in answers) == [1, 2, 3, 4, 5, 6]
            expected = alone(session)
            for answer in sorted(answers, key=lambda answer: answer.step):
                assert same(answer.acted.outputs, expected.take(seen(5)))

    run(scenario)


def test_steps_of_many_sessions_share_runtime_calls(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            begun = [sessions.begin(NAME, 1) for _ in range(40)]
            runtime, free = registry.runtimes[1], threading.Event()
            act = runtime._run

            def act_when_free(arrays: list[Array]) -> list[Array]:
                assert free.wait(60)
                return act(arrays)

            runtime._run = act_when_free  # type: ignore[method-assign]
            stepping = [asyncio.create_task(sessions.step(registry, session, seen(1))) for session in begun]
            while registry.policies[1].statistics().waiting < 40:
                await asyncio.sleep(0.001)
            free.set()
            await asyncio.gather(*stepping)
            assert runtime.items == 40
            assert runtime.batches <= 6  # of at most 8; the first began when few had come

    run(scenario, SLOW)


def test_what_is_refused_moves_nothing(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1)
            await sessions.step(registry, session, seen(1))
            state = {"digest": np.zeros((1, 2), np.int64), "odd": np.array([True])}
            with pytest.raises(InvalidRequest, match=r"expected no state, which the session holds; got digest, odd"):
                await sessions.step(registry, session, seen(1) | state)
            with pytest.raises(InvalidTensor, match=r"x: expected one item.*; got 2"):
                await sessions.step(registry, session, {"x": np.zeros(2, np.int64)})
            with pytest.raises(InvalidTensor, match=r"x: expected int64\[\]; got nothing"):
                await sessions.step(registry, session, {"is_init": np.array([True])})
            with pytest.raises(InvalidTensor, match="values of at most 999"):
                await sessions.step(registry, session, seen(1000))
            registry.runtimes[1].failing = True
            with pytest.raises(RuntimeFailure):
                await sessions.step(registry, session, seen(1))
            assert sessions.get(NAME, session.id).step == 1

    run(scenario)


def test_a_cancelled_step_can_be_sent_again(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1)
            step = asyncio.create_task(sessions.step(registry, session, seen(1), 1))
            await asyncio.sleep(0)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            again = await sessions.step(registry, session, seen(1), 1)
            assert same(again.acted.outputs, alone(session).take(seen(1)))

    run(scenario)


def test_a_session_stays_on_its_version_and_ends_with_it(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1)
            expected = alone(session)
            await sessions.step(registry, session, seen(1))
            expected.take(seen(1))
            registry.publish()
            stepped = await sessions.step(registry, session, seen(2))
            assert same(stepped.acted.outputs, expected.take(seen(2)))
            await registry.withdraw(1).close()
            with pytest.raises(SessionExpired, match="the version that it began with is gone: digest has no version"):
                await sessions.step(registry, session, seen(3))

    run(scenario)


def test_an_id_is_genuine_or_unknown(path: Path, clock: Clock) -> None:
    with Sessions(path, Limits(), clock) as sessions:
        session = sessions.begin(NAME, 1)
        assert sessions.get(NAME, session.id) == session
        forged = [session.id[:-1] + ("A" if session.id[-1] != "A" else "B"), session.id[1:], session.id + "A"]
        for id_ in [*forged, "", "1", "?" * 32, "ö" * 32, "A" * 32, session.id + "=", session.id + "\n"]:
            with pytest.raises(UnknownSession):
                sessions.get(NAME, id_)
        with pytest.raises(UnknownSession, match="no session of other has this id"):
            sessions.get("other", session.id)
        assert len({sessions.begin(NAME, 1).id for _ in range(100)}) == 100


def test_a_gone_session_is_told_from_one_that_never_was(path: Path, clock: Clock) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits(sessions=2, idle_s=60), clock) as sessions:
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


def test_a_session_that_goes_while_its_step_runs_is_told(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1)
            step = asyncio.create_task(sessions.step(registry, session, seen(1)))
            await asyncio.sleep(0)
            sessions.end(session)
            with pytest.raises(SessionExpired):
                await step

    run(scenario)


def test_who_was_idle_for_longest_makes_room(path: Path, clock: Clock) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits(bytes=3 * RECORD_BYTES), clock) as sessions:
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


def test_a_session_larger_than_all_may_be_is_refused_and_does_not_move(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits(bytes=RECORD_BYTES - 1)) as sessions:
            session = sessions.begin(NAME, 1)
            other = sessions.begin(NAME, 1)
            with pytest.raises(SessionTooLarge, match="may have 32 bytes of state and answers; this one has 33"):
                await sessions.step(registry, session, seen(1))
            assert sessions.get(NAME, session.id).step == 0
            assert sessions.get(NAME, other.id).step == 0

    run(scenario)


def test_an_owner_sees_its_own(path: Path) -> None:
    with Sessions(path, Limits()) as sessions:
        mine = [sessions.begin(NAME, 1, owner="me") for _ in range(3)]
        sessions.begin(NAME, 1, owner="you")
        sessions.begin("other", 1, owner="me")
        sessions.begin(NAME, 1)
        assert [session.id for session in sessions.owned(NAME, "me")] == [session.id for session in mine]
        assert sessions.owned(NAME, "nobody") == []
        sessions.end(mine[1])
        assert len(sessions.owned(NAME, "me")) == 2


def test_secrets_of_owners_are_not_in_the_file(path: Path) -> None:
    with Sessions(path, Limits()) as sessions:
        session = sessions.begin(NAME, 1, owner="a-secret-of-mine", sequence="a-name-of-mine")
        content = b"".join(file.read_bytes() for file in path.parent.iterdir())
        for secret in (b"a-secret-of-mine", b"a-name-of-mine", session.id.encode()):
            assert secret not in content
        assert path.stat().st_mode & 0o077 == 0


def test_sequences_are_the_clients_own_names(path: Path) -> None:
    with Sessions(path, Limits()) as sessions:
        number = sessions.begin(NAME, 1, sequence=1)
        text = sessions.begin(NAME, 1, sequence="1")
        owned = sessions.begin(NAME, 1, sequence=1, owner="me")
        assert sessions.sequence(NAME, 1).id == number.id
        assert sessions.sequence(NAME, "1").id == text.id
        assert sessions.sequence(NAME, 1, "me").id == owned.id
        again = sessions.begin(NAME, 1, sequence=1)
        assert sessions.sequence(NAME, 1).id == again.id
        with pytest.raises(SessionExpired):
            sessions.get(NAME, number.id)
        for unknown in (2, "2", 2**64, ""):
            with pytest.raises(UnknownSession, match=r"never begun, ended or timed out"):
                sessions.sequence(NAME, unknown)
        with pytest.raises(UnknownSession):
            sessions.sequence("other", 1)


def test_sessions_outlive_a_restart(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1, seed=3, exploration="random", owner="me")
            first = await sessions.step(registry, session, seen(4), 1)
        with Sessions(path, Limits()) as sessions:
            (found,) = sessions.owned(NAME, "me")
            assert found == replace(session, step=1, idle_s=found.idle_s)
            again = await sessions.step(registry, session, seen(4), 1)
            assert same(again.acted.outputs, first.acted.outputs)
            second = await sessions.step(registry, session, seen(5), 2)
            expected = alone(session)
            expected.take(seen(4))
            assert same(second.acted.outputs, expected.take(seen(5)))

    run(scenario)


def test_the_file_does_not_grow_with_the_sessions_that_come_and_go(path: Path, clock: Clock) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits(sessions=200, idle_s=60), clock) as sessions:

            async def generation() -> int:
                for _ in range(250):
                    await sessions.step(registry, sessions.begin(NAME, 1), seen(1))
                clock.now_s += 100
                sessions.statistics()
                return sum(file.stat().st_size for file in path.parent.iterdir())

            sizes = [await generation() for _ in range(12)]
            assert max(sizes[6:]) <= max(sizes[:6])

    run(scenario)


def test_a_damaged_record_is_forgotten_rather_than_used(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session, other = sessions.begin(NAME, 1), sessions.begin(NAME, 1)
            await sessions.step(registry, session, seen(1))
            await sessions.step(registry, other, seen(2))
            with sqlite3.connect(path) as file:
                file.execute("UPDATE session SET state = (SELECT state FROM session WHERE number = 2) WHERE number = 1")
            file.close()
            with pytest.raises(SessionExpired):
                await sessions.step(registry, session, seen(1))
            await sessions.step(registry, other, seen(2))

    run(scenario)


@pytest.mark.parametrize("content", [b"this is not a database, and long enough to see it" * 30, b"SQLite format 3\0"])
def test_a_file_of_something_else_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(SessionsUnavailable, match=r"file cannot be used: |has format 0"), Sessions(path, Limits()):
        pass
    assert path.read_bytes() == content


def test_a_damaged_file_and_a_newer_one_are_refused(path: Path) -> None:
    with Sessions(path, Limits()) as sessions:
        for _ in range(100):
            sessions.begin(NAME, 1)
    content = bytearray(path.read_bytes())
    content[3072:] = bytes(len(content) - 3072)
    path.write_bytes(content)
    with pytest.raises(SessionsUnavailable, match=r"damaged|malformed"), Sessions(path, Limits()):
        pass
    path.unlink()
    with Sessions(path, Limits()):
        pass
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA user_version = 2")
    file.close()
    with pytest.raises(SessionsUnavailable, match="has format 2 and this actserve reads 1"), Sessions(path, Limits()):
        pass


def test_no_folder_no_sessions(tmp_path: Path) -> None:
    with (
        pytest.raises(SessionsUnavailable, match="cannot be made: No such file"),
        Sessions(tmp_path / "no" / "x", Limits()),
    ):
        pass


def test_a_full_disk_fails_the_step_and_not_the_session(path: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1)
            ((pages,),) = sessions._file.rows("PRAGMA page_count")
            sessions._file.rows(f"PRAGMA max_page_count = {pages}")
            with pytest.raises(SessionsUnavailable, match="full"):
                [sessions.begin(NAME, 1) for _ in range(100)]
            sessions._file.rows("PRAGMA max_page_count = 100000")
            await sessions.step(registry, session, seen(1), 1)

    run(scenario)


def test_closed_sessions_say_so(path: Path) -> None:
    sessions = Sessions(path, Limits())
    with pytest.raises(SessionsUnavailable, match="closed"):
        sessions.begin(NAME, 1)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_out_of_range_is_refused(path: Path, seed: int) -> None:
    with Sessions(path, Limits()) as sessions:
        with pytest.raises(InvalidRequest, match="expected a seed"):
            sessions.begin(NAME, 1, seed=seed)
        assert sessions.begin(NAME, 1, seed=MAX_SEED).seed == MAX_SEED


def test_each_step_has_a_seed_of_its_own() -> None:
    seeds = {step_seed(seed, step) for seed in (0, 1, MAX_SEED) for step in range(1, 200)}
    assert len(seeds) == 3 * 199
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    assert step_seed(7, 1) == 8875243823434874480, "clients in other languages count on it"


def test_the_wall_clock_may_be_set_back(path: Path, clock: Clock) -> None:
    with Sessions(path, Limits(idle_s=60), clock) as sessions:
        session = sessions.begin(NAME, 1)
        clock.now_s -= 3600
        assert sessions.get(NAME, session.id).idle_s == 0


def test_settings_have_the_limits() -> None:
    settings = Settings()
    assert Limits(settings.max_sessions, settings.max_session_bytes, settings.session_idle_s) == Limits()


def test_a_clock_that_is_set_ends_no_session(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(path, Limits()) as sessions:
            session = sessions.begin(NAME, 1)
            await sessions.step(registry, session, seen(1))
            for hours in (5, -50, 5000):
                set_to = time.time() + hours * 3600
                monkeypatch.setattr("time.time", lambda: set_to)  # noqa: B023, it is called at once
                assert sessions.get(NAME, session.id).idle_s < 60
            stepped = await sessions.step(registry, sessions.get(NAME, session.id), seen(1), 2)
            assert stepped.step == 2

    run(scenario)


def test_sessions_outlive_a_host_that_begins_anew(path: Path) -> None:
    """Whose clock then begins anew, too."""
    before, after = Clock(), Clock()
    after.now_s = 5.0
    with Sessions(path, Limits(), before) as sessions:
        session = sessions.begin(NAME, 1)
    with Sessions(path, Limits(idle_s=600), after) as sessions:
        assert sessions.get(NAME, session.id).idle_s == 0
        after.now_s += 601
        with pytest.raises(SessionExpired):
            sessions.get(NAME, session.id)


def test_an_id_names_the_home_that_alone_has_the_session(tmp_path: Path) -> None:
    homes = (0, 5, (1 << 23) - 1)
    held = [Sessions(tmp_path / f"{home}.sqlite", Limits(), home=home) for home in homes]
    for home, sessions in zip(homes, held, strict=True):
        with sessions:
            ids = [sessions.begin(NAME, 1).id for _ in range(3)]
            assert {home_of(id_) for id_ in ids} == {home}
            assert [sessions.get(NAME, id_).id for id_ in ids] == ids
            for other in held:
                if other is not sessions:
                    with other, pytest.raises(SessionElsewhere, match="another host holds the session"):
                        other.get(NAME, ids[0])
            for forged in (ids[0][:-4] + "AAAA", "nonsense!"):
                with pytest.raises(UnknownSession):
                    sessions.get(NAME, forged)
    assert home_of("nonsense!") is None
