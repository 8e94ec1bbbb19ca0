"""Steps of sessions: in order, each taken once, and each as the policy alone would act."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actserve.core.completion import step_seed
from actserve.core.errors import InvalidRequest, InvalidTensor, RuntimeFailure, SessionExpired, StepConflict
from actserve.core.signature import Array
from actserve.server.sessions import SessionLimits, Sessions, replayed
from tests.fake_policy import NAME, SLOW, Versions, same, seen
from tests.sessions import alone, run
from tests.waiting import until_in_loop


def test_a_session_acts_as_the_policy_alone(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
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


def test_a_step_sent_again_gets_the_stored_answer_whatever_it_carries(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            session = sessions.begin(NAME, 1, exploration="random")
            policy = await registry.get(NAME, 1)
            first = await sessions.step(registry, session, seen(1), 1)
            batch = {"x": np.zeros(3, np.int64)}
            stored, last = sessions.resume(NAME, session.id)
            assert stored == replace(sessions.get(NAME, session.id), idle_s=stored.idle_s)
            for again in (
                await sessions.step(registry, session, seen(999), 1),
                await sessions.step(registry, session, batch, 1),
                replayed(policy, stored, last),
            ):
                assert again.replayed
                assert same(again.acted.outputs, first.acted.outputs)
                assert again.acted.seed == first.acted.seed
            assert sessions.get(NAME, session.id).step == 1
            assert registry.runtimes[1].items == 1

    run(scenario)


@pytest.mark.parametrize("step", [0, 1, 4, 10**18])
def test_any_other_step_is_told_what_was_expected(sessions_file: Path, step: int) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            session = sessions.begin(NAME, 1)
            for _ in range(2):
                await sessions.step(registry, session, seen(1))
            with pytest.raises(StepConflict, match=rf"expected step 3 \(or 2 again.*\); got {step}") as raised:
                await sessions.step(registry, session, seen(1), step)
            assert raised.value.detail == {"expected": 3, "got": step}
            assert sessions.get(NAME, session.id).step == 2

    run(scenario)


def test_the_first_step_has_no_answer_before_it(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            session = sessions.begin(NAME, 1)
            with pytest.raises(StepConflict, match="expected step 1; got 0"):
                await sessions.step(registry, session, seen(1), 0)

    run(scenario)


def test_duplicates_in_flight_run_on_and_get_one_answer(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as one, Sessions(sessions_file, SessionLimits()) as other:
            session = one.begin(NAME, 1, exploration="random")
            workers = [one, other] * 3
            answers = await asyncio.gather(*(w.step(registry, session, seen(8), 1) for w in workers))
            assert sum(not answer.replayed for answer in answers) == 1
            for answer in answers:
                assert same(answer.acted.outputs, answers[0].acted.outputs)
            assert other.get(NAME, session.id).step == 1

    run(scenario)


def test_steps_without_a_number_all_count(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            session = sessions.begin(NAME, 1)
            answers = await asyncio.gather(*(sessions.step(registry, session, seen(5)) for _ in range(6)))
            assert sorted(answer.step for answer in answers) == [1, 2, 3, 4, 5, 6]
            expected = alone(session)
            for answer in sorted(answers, key=lambda answer: answer.step):
                assert same(answer.acted.outputs, expected.take(seen(5)))

    run(scenario)


def test_steps_of_many_sessions_share_runtime_calls(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            begun = [sessions.begin(NAME, 1) for _ in range(40)]
            runtime, free = registry.runtimes[1], threading.Event()
            act = runtime._run

            def act_when_free(arrays: list[Array]) -> list[Array]:
                assert free.wait(60)
                return act(arrays)

            runtime._run = act_when_free  # type: ignore[method-assign]
            stepping = [asyncio.create_task(sessions.step(registry, session, seen(1))) for session in begun]
            await until_in_loop(lambda: registry.policies[1].statistics().waiting == 40)
            free.set()
            await asyncio.gather(*stepping)
            assert runtime.items == 40
            assert runtime.batches <= 6  # of at most 8; the first began when few had come

    run(scenario, SLOW)


def test_what_is_refused_moves_nothing(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
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


def test_a_cancelled_step_can_be_sent_again(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            session = sessions.begin(NAME, 1)
            step = asyncio.create_task(sessions.step(registry, session, seen(1), 1))
            await asyncio.sleep(0)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            again = await sessions.step(registry, session, seen(1), 1)
            assert same(again.acted.outputs, alone(session).take(seen(1)))

    run(scenario)


def test_a_session_stays_on_its_version_and_ends_with_it(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
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


def test_a_session_that_goes_while_its_step_runs_is_told(sessions_file: Path) -> None:
    async def scenario(registry: Versions) -> None:
        with Sessions(sessions_file, SessionLimits()) as sessions:
            session = sessions.begin(NAME, 1)
            step = asyncio.create_task(sessions.step(registry, session, seen(1)))
            await asyncio.sleep(0)
            sessions.end(session)
            with pytest.raises(SessionExpired):
                await step

    run(scenario)
