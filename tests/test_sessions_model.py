"""Sessions against a policy that runs alone: whatever clients and workers do, no state is lost, doubled or mixed up."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actserve.core.errors import InvalidRequest, SessionExpired, StepConflict, UnknownSession
from actserve.core.signature import Exploration
from actserve.server.sessions import Session, SessionLimits, Sessions, StepResult
from tests.clock import Clock
from tests.fake_policy import NAME, RECORD_BYTES, Alone, Versions, same, seen

WORKERS = 2
LIMITS = SessionLimits(sessions=24, bytes=16 * RECORD_BYTES, idle_s=60)
Result = TypeVar("Result")
workers = st.integers(0, WORKERS - 1)
observations = st.integers(0, 999)
resets = st.none() | st.booleans()
indices = st.integers(0, 10**6)  # of one of the live, taken modulo their number


class Client:
    """One session as its client knows it, and what it must answer."""

    def __init__(self, session: Session, used_s: float, sequence: int | None = None) -> None:
        self.session = session
        self.alone = Alone(session.version, session.seed, session.exploration)
        self.used_s = used_s
        self.sequence = sequence


class SessionsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.registry = Versions()
        self.workers = [self._open() for _ in range(WORKERS)]
        self.live: list[Client] = []
        self.order: dict[Client, int] = {}  # in which they were begun; decides between two that are idle as long
        self.gone: list[Client] = []

    def teardown(self) -> None:
        for worker in self.workers:
            worker.__exit__(None, None, None)
        self.run(self.registry.close())
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()
        self.folder.cleanup()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(work)

    def _open(self) -> Sessions:
        return Sessions(Path(self.folder.name) / "sessions.sqlite", LIMITS, self.clock).__enter__()

    def pick(self, index: int) -> Client:
        return self.live[index % len(self.live)]

    async def step(self, worker: int, client: Client, x: int, reset: bool | None, number: int | None) -> StepResult:
        return await self.workers[worker].step(self.registry, client.session, seen(x, reset), number)

    def add(self, client: Client) -> None:
        self.live.append(client)
        self.order[client] = len(self.order)
        self.make_room(client)

    def moved(self, client: Client) -> None:
        """Its client was heard of just now; others may have to make room for its state."""
        client.used_s = self.clock.now_s
        self.make_room(client)

    def make_room(self, keep: Client) -> None:
        def held() -> int:
            return sum(RECORD_BYTES for client in self.live if client.alone.step)

        while len(self.live) > LIMITS.sessions or held() > LIMITS.bytes:
            others = [client for client in self.live if client is not keep]
            self.lose(min(others, key=lambda client: (client.used_s, self.order[client])))

    def lose(self, client: Client) -> None:
        self.live.remove(client)
        self.gone.append(client)

    @initialize()
    def one_version(self) -> None:
        self.run(self._publish())

    async def _publish(self) -> None:
        self.registry.publish()

    @rule()
    def a_new_version_goes_live(self) -> None:
        if self.registry.highest < 5:
            self.run(self._publish())

    @rule(
        worker=workers,
        count=st.sampled_from([1, 2, 10]),
        seed=st.none() | st.integers(0, 2**63 - 1),
        exploration=st.sampled_from([None, "deterministic", "random"]),
    )
    def begin(self, worker: int, count: int, seed: int | None, exploration: Exploration | None) -> None:
        for _ in range(count):
            session = self.workers[worker].begin(
                NAME, self.registry.highest, seed=seed, exploration=exploration, owner="me"
            )
            self.add(Client(session, self.clock.now_s))

    @rule(worker=workers, name=st.integers(0, 2))
    def begin_a_sequence(self, worker: int, name: int) -> None:
        for client in [client for client in self.live if client.sequence == name]:
            self.lose(client)
        session = self.workers[worker].begin(NAME, self.registry.highest, owner="me", sequence=name)
        self.add(Client(session, self.clock.now_s, name))
        assert self.workers[worker].sequence(NAME, name, "me").id == session.id

    @precondition(lambda self: self.live)
    @rule(worker=workers, index=indices, x=observations, reset=resets, numbered=st.booleans())
    def take_a_step(self, worker: int, index: int, x: int, reset: bool | None, numbered: bool) -> None:
        client = self.pick(index)
        number = client.alone.step + 1
        stepped = self.run(self.step(worker, client, x, reset, number if numbered else None))
        assert (stepped.step, stepped.replayed) == (number, False)
        assert same(stepped.acted.outputs, client.alone.take(seen(x, reset)))
        self.moved(client)

    @rule(worker=workers, seed=st.integers(0, 2**32), pause_s=st.sampled_from([0.0, 0.5]))
    def all_step_one_by_one(self, worker: int, seed: int, pause_s: float) -> None:
        """In any order, which is then the order in which they make room."""
        clients = list(self.live)
        random.Random(seed).shuffle(clients)
        for client in clients:
            self.time_passes(pause_s)
            if client in self.live:
                self.take_a_step(worker, self.live.index(client), seed % 1000, None, True)

    @precondition(lambda self: self.live)
    @rule(seed=st.integers(0, 2**32), reset=resets)
    def all_step_at_once(self, seed: int, reset: bool | None) -> None:
        """From any worker, in any order. One in four is sent twice and one in eight is cancelled, then sent again."""
        rng = random.Random(seed)
        busy = [client for client in self.live if client.alone.step][: LIMITS.bytes // RECORD_BYTES]
        if not busy:
            return
        rng.shuffle(busy)
        self.run(self._all_step(busy, rng, reset))

    async def _all_step(self, clients: list[Client], rng: random.Random, reset: bool | None) -> None:
        async def one(client: Client) -> None:
            x, number = rng.randrange(1000), client.alone.step + 1
            expected = client.alone.take(seen(x, reset))
            attempts = [self.step(rng.randrange(WORKERS), client, x, reset, number)]
            if rng.random() < 0.25:
                attempts.append(self.step(rng.randrange(WORKERS), client, x, reset, number))
            tasks = [asyncio.ensure_future(attempt) for attempt in attempts]
            if rng.random() < 0.125:
                for _ in range(rng.randrange(5)):
                    await asyncio.sleep(0)
                tasks[0].cancel()
                tasks.append(asyncio.ensure_future(self.step(rng.randrange(WORKERS), client, x, reset, number)))
            results = await asyncio.gather(*tasks, return_exceptions=True)
            answers = [result for result in results if not isinstance(result, asyncio.CancelledError)]
            assert answers
            for answer in answers:
                assert isinstance(answer, StepResult), answer
                assert answer.step == number
                assert same(answer.acted.outputs, expected)
            client.used_s = self.clock.now_s

        await asyncio.gather(*(one(client) for client in clients))

    @precondition(lambda self: any(client.alone.step for client in self.live))
    @rule(worker=workers, index=indices, x=observations)
    def send_the_last_step_again(self, worker: int, index: int, x: int) -> None:
        stepped = [client for client in self.live if client.alone.step]
        client = stepped[index % len(stepped)]
        again = self.run(self.step(worker, client, x, True, client.alone.step))
        assert again.replayed
        assert same(again.acted.outputs, client.alone.outputs)

    @precondition(lambda self: self.live)
    @rule(worker=workers, index=indices, by=st.sampled_from([-9, -1, 2, 7]))
    def send_a_step_out_of_order(self, worker: int, index: int, by: int) -> None:
        client = self.pick(index)
        with pytest.raises(StepConflict) as raised:
            self.run(self.step(worker, client, 1, None, client.alone.step + by))
        assert raised.value.detail["expected"] == client.alone.step + 1

    @precondition(lambda self: self.live)
    @rule(index=indices, xs=st.lists(observations, min_size=2, max_size=5))
    def send_one_step_with_different_observations(self, index: int, xs: list[int]) -> None:
        """Then one of them counts, and all get its answer."""
        client = self.pick(index)
        number = client.alone.step + 1

        async def send() -> list[StepResult]:
            return await asyncio.gather(*(self.step(i % WORKERS, client, x, None, number) for i, x in enumerate(xs)))

        answers = self.run(send())
        assert sum(not answer.replayed for answer in answers) == 1
        counted = next(x for x, answer in zip(xs, answers, strict=True) if not answer.replayed)
        expected = client.alone.take(seen(counted))
        assert all(same(answer.acted.outputs, expected) for answer in answers)
        self.moved(client)

    @precondition(lambda self: self.live)
    @rule(worker=workers, index=indices, x=observations, turns=st.integers(0, 6))
    def cancel_a_step_and_send_it_again(self, worker: int, index: int, x: int, turns: int) -> None:
        client = self.pick(index)
        number = client.alone.step + 1

        async def cancel() -> None:
            task = asyncio.ensure_future(self.step(worker, client, x, None, number))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self.run(cancel())
        again = self.run(self.step(1 - worker, client, x, None, number))
        assert same(again.acted.outputs, client.alone.take(seen(x)))
        self.moved(client)

    @precondition(lambda self: self.live)
    @rule(worker=workers, index=indices)
    def send_nonsense(self, worker: int, index: int) -> None:
        client = self.pick(index)
        nonsense = [
            {"x": np.array([1000])},
            {"x": np.array([1, 2])},
            {"y": np.array([1])},
            {**seen(1), "digest": np.zeros((1, 2), np.int64), "odd": np.array([True])},
        ]
        for tensors in nonsense:
            with pytest.raises(InvalidRequest):
                self.run(self.workers[worker].step(self.registry, client.session, tensors))
        with pytest.raises(UnknownSession):
            self.workers[worker].get("other", client.session.id)

    @precondition(lambda self: self.live)
    @rule(worker=workers, index=indices)
    def end(self, worker: int, index: int) -> None:
        client = self.pick(index)
        self.workers[worker].end(client.session)
        self.lose(client)

    @rule(seconds=st.sampled_from([0.0, 0.5, 10.0, 45.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds
        for client in [c for c in self.live if c.used_s <= self.clock.now_s - LIMITS.idle_s]:
            self.lose(client)

    @rule(worker=workers)
    def a_worker_restarts(self, worker: int) -> None:
        self.workers[worker].__exit__(None, None, None)
        self.workers[worker] = self._open()

    @precondition(lambda self: self.gone)
    @rule(worker=workers, index=indices)
    def ask_for_a_gone_one(self, worker: int, index: int) -> None:
        client = self.gone[index % len(self.gone)]
        with pytest.raises(SessionExpired):
            self.workers[worker].get(NAME, client.session.id)
        with pytest.raises(SessionExpired):
            self.run(self.step(worker, client, 1, None, client.alone.step + 1))

    @invariant()
    def both_workers_hold_exactly_the_live(self) -> None:
        for worker in self.workers:
            held = {session.id: session.step for session in worker.owned(NAME, "me")}
            assert held == {client.session.id: client.alone.step for client in self.live}


TestSessionsMachine = SessionsMachine.TestCase
TestSessionsMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def test_three_hundred_sessions_are_played_to_the_end(tmp_path: Path) -> None:
    """Interleaved on two workers with retries, duplicates, resets and a new version in the middle."""

    async def play() -> None:
        registry = Versions()
        registry.publish()
        path = tmp_path / "sessions.sqlite"
        with Sessions(path, SessionLimits()) as one, Sessions(path, SessionLimits()) as other:

            async def client(seed: int) -> None:
                rng = random.Random(seed)
                begun = rng.choice([one, other]).begin(NAME, registry.highest, exploration="random")
                expected = Alone(begun.version, begun.seed, begun.exploration)
                for number in range(1, 31):
                    x, reset = rng.randrange(1000), rng.choice([None, None, None, True])
                    answer = expected.take(seen(x, reset))
                    for _ in range(rng.choice([1, 1, 1, 2])):
                        worker = rng.choice([one, other])
                        stepped = await worker.step(registry, begun, seen(x, reset), number)
                        assert same(stepped.acted.outputs, answer)
                rng.choice([one, other]).end(begun)

            first = [asyncio.create_task(client(seed)) for seed in range(150)]
            await asyncio.sleep(0.05)
            registry.publish()
            await asyncio.gather(*first, *(client(seed) for seed in range(150, 300)))
            assert one.statistics().sessions == 0
            assert registry.runtimes[1].items >= 150 * 30
            assert registry.runtimes[2].items >= 150 * 30
        await registry.close()

    asyncio.run(play())
