"""An exception, wherever it is raised, is an answer: requests do not wait for ever, and the next ones are served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect

from actserve.core.errors import NotServing, RuntimeFailure
from actserve.core.repeat import repeat
from actserve.core.settings import Settings
from actserve.core.signature import Array, Arrays
from actserve.engine.arena import Arena
from actserve.engine.batch import Answer
from actserve.engine.batcher import Batcher
from actserve.server.fastpath.act_codec import ActCodec
from actserve.server.fastpath.http_protocol import FastPathProtocol
from tests import stream_service
from tests.fake_policy import NAME
from tests.fastpath_service import FAST, ITEM_BYTES, Service, exchange, request, running
from tests.waiting import until, until_in_loop

BODY = bytes(ITEM_BYTES)
WITHIN_S = 30.0


class Panic(BaseException):
    """As the panics of extension modules in Rust: no `Exception`."""


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, times: int = 1) -> list[int]:
    """The next `times` calls of `owner.name` raise `error`. Returns the calls so far."""
    original, calls = getattr(owner, name), []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, fail)
    return calls


def double(batch: Mapping[str, Array]) -> Arrays:
    return {"y": batch["x"] * 2}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("where", ["_gather", "_count", "_call"])
def test_an_error_around_a_batch_is_its_answer_and_the_next_batch_runs(where: str, quick: bool) -> None:
    async def scenario() -> None:
        broken = 2  # the batch of two, then the first of them alone

        def run(batch: Mapping[str, Array]) -> Arrays:
            if where == "_call" and broken:
                raise Panic
            return double(batch)

        batcher = Batcher(run, max_items=8, max_waiting=100, quick=quick)
        batcher.start()
        if where != "_call":
            original = batcher._gather if where == "_gather" else batcher.meters.add_batch

            def fail(*arguments: Any) -> Any:
                if broken:
                    raise MemoryError
                return original(*arguments)

            if where == "_gather":
                # Replaced on this one object, which mypy forbids for methods.
                batcher._gather = fail  # type: ignore[method-assign, assignment]
            else:
                batcher.meters = type("Broken", (), {"add_batch": staticmethod(fail)})()
        async with asyncio.timeout(WITHIN_S):
            pair = [batcher.submit({"x": np.array([x])}, 1) for x in (1.0, 2.0)]
            for result in await asyncio.gather(*pair, return_exceptions=True):
                assert isinstance(result, Answer if where == "_count" else RuntimeFailure)
            broken = 0
            assert (await batcher.submit({"x": np.array([3.0])}, 1)).outputs["y"].item() == 6
            assert batcher.statistics().waiting == 0
            await batcher.close()

    asyncio.run(scenario())


def test_a_batcher_whose_bookkeeping_fails_answers_all_and_says_so() -> None:
    async def scenario() -> None:
        gate = threading.Event()

        def run(batch: Mapping[str, Array]) -> Arrays:
            assert gate.wait(WITHIN_S)
            return double(batch)

        batcher = Batcher(run, max_items=1, max_waiting=100)
        batcher.start()
        waiting = [batcher.submit({"x": np.array([x])}, 1) for x in (1.0, 2.0, 3.0)]
        await asyncio.sleep(0.05)

        def fail() -> None:
            raise MemoryError

        # Replaced on this one object, which mypy forbids for methods.
        batcher._go_on = fail  # type: ignore[method-assign]
        gate.set()
        async with asyncio.timeout(WITHIN_S):
            first, *others = await asyncio.gather(*waiting, return_exceptions=True)
            assert not isinstance(first, BaseException)
            assert [type(other) for other in others] == [NotServing, NotServing]
            assert batcher.failed is not None
            with pytest.raises(NotServing, match="being replaced"):
                batcher.submit({"x": np.array([1.0])}, 1)
            await batcher.close()

    asyncio.run(scenario())


def test_a_program_that_does_not_return_is_noticed_by_the_time_in_which_it_could_run() -> None:
    async def scenario() -> None:
        gate, entered = threading.Event(), threading.Event()

        def run(batch: Mapping[str, Array]) -> Arrays:
            entered.set()
            assert gate.wait(WITHIN_S)
            return double(batch)

        batcher = Batcher(run, max_items=1, max_waiting=100)
        batcher.start()
        stuck = batcher.submit({"x": np.array([1.0])}, 1)
        await until_in_loop(entered.is_set)
        for _ in range(4):
            batcher.check_program(limit_ns=3, elapsed_ns=1)
        assert batcher.failed is None
        batcher.check_program(limit_ns=3, elapsed_ns=1)
        with pytest.raises(NotServing, match="being replaced"):
            await stuck
        await batcher.close()
        gate.set()

    asyncio.run(scenario())


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize(
    ("owner", "name"), [(Arena, "inputs"), (Arena, "scatter"), (ActCodec, "answer"), (FastPathProtocol, "_answer")]
)
def test_on_the_fast_path_too(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, slow: bool) -> None:
    with running(FAST, slow=slow) as service:
        arena = service.policy.batcher.arena
        assert arena is not None
        free = arena.free
        assert b"200 OK" in exchange(service, [request(BODY)])
        calls = once(monkeypatch, owner, name, MemoryError())
        assert b"HTTP/1.1 500 " in exchange(service, [request(BODY)])
        assert calls
        assert b"200 OK" in exchange(service, [request(BODY)])
        assert b"200 OK" in exchange(service, [b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n"])
        assert (arena.free, service.policy.statistics().waiting) == (free, 0)


def test_an_error_while_a_request_is_received_frees_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FAST) as service:
        arena = service.policy.batcher.arena
        assert arena is not None
        free = arena.free
        once(monkeypatch, service.policy.batcher, "enter", MemoryError())
        assert exchange(service, [request(BODY)]) == b""  # closed
        until(lambda: arena.free == free)
        assert b"200 OK" in exchange(service, [request(BODY)])


def test_the_state_of_an_episode_moves_as_a_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer that is lost after the state has moved ends the episode: an error would say that it has not."""
    with stream_service.running() as service:
        url = service.url.replace("http", "ws") + f"/policies/{NAME}/stream"
        item = np.array(5, np.int64).tobytes()
        with connect(url, proxy=None) as stream, connect(url, proxy=None) as other:
            for socket in (stream, other):
                socket.recv(10)
                socket.send(item)
                socket.recv(10)
            once(monkeypatch, Arena, "scatter", MemoryError())
            stream.send(item)
            assert '"runtime_failure"' in str(stream.recv(10))
            for socket in (stream, other):  # both have taken one step
                socket.send(item)
            assert stream.recv(10)[16:] == other.recv(10)[16:]


def test_background_work_goes_on_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        calls = 0

        async def work() -> None:
            nonlocal calls
            calls += 1
            if calls < 4:
                raise ZeroDivisionError

        task = asyncio.create_task(repeat(0.001, work, "counting"))
        await until_in_loop(lambda: calls > 5)
        task.cancel()

    asyncio.run(scenario())
    assert caplog.text.count("counting failed") == 1


def test_connections_are_watched_although_one_of_them_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FAST, Settings(), timeout_keep_alive=1) as service, service.connect() as first:
        first.sendall(request(BODY))
        assert b"200 OK" in first.recv(1000)
        once(monkeypatch, FastPathProtocol, "close_if_idle", ZeroDivisionError())
        with service.connect() as second:
            second.sendall(request(BODY))
            assert b"200 OK" in second.recv(1000)
            assert second.recv(1000) == b"", "it is still closed when it is idle"


def test_a_failed_policy_makes_the_worker_unready(service_failing: Service) -> None:
    assert b"HTTP/1.1 503 " in exchange(service_failing, [b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n"])
    assert b"HTTP/1.1 200 " in exchange(service_failing, [b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"])
    assert b"HTTP/1.1 503 " in exchange(service_failing, [request(BODY)])


@pytest.fixture
def service_failing() -> Iterator[Service]:
    with running(FAST) as service:
        service.policy.batcher._fail(MemoryError())
        yield service
