"""The event loop never waits: whatever one request needs, the others are answered meanwhile."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import pydantic_core
import pytest
import urllib3

from actserve import wire
from actserve.server.http.bounded_turns import MAX_BEGUN, BoundedTurnsMiddleware
from actserve.server.protocols.oip.infer_request import parse_json
from actserve.telemetry.loop_lag import EVERY_S, LoopLag
from actserve.wire import large_json
from actserve.wire.payload import MANY_VALUES
from tests import stream_service
from tests.fake_policy import NAME

ACT = f"/policies/{NAME}/act"
INFER = f"/v2/models/{NAME}/infer"
MANY = 2 * MANY_VALUES
OTHERS = pydantic_core.to_json({"x": 1})
JSON = {"Content-Type": "application/json"}
LARGE: dict[str, tuple[str, bytes]] = {
    "act": (ACT, pydantic_core.to_json({"x": [1] * MANY})),
    "infer": (
        INFER,
        pydantic_core.to_json({"inputs": [{"name": "x", "datatype": "INT64", "shape": [MANY], "data": [1] * MANY}]}),
    ),
}


@pytest.fixture(scope="module")
def service() -> Iterator[stream_service.Service]:
    with stream_service.running() as up:
        yield up


def post(service: stream_service.Service, path: str, body: bytes, **headers: str) -> urllib3.BaseHTTPResponse:
    return urllib3.request(
        "POST", service.url + path, body=body, headers={**JSON, **headers}, retries=False, timeout=60
    )


def locked(service: stream_service.Service) -> sqlite3.Connection:
    """A connection that holds the lock of the sessions file, as another process."""
    app: Any = service.server.config.app
    lock = sqlite3.connect(app.state.sessions._file.path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    return lock


@pytest.mark.parametrize("door", LARGE)
def test_others_are_answered_while_a_large_body_is_read(
    service: stream_service.Service, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    reading, go_on, load = threading.Event(), threading.Event(), large_json.load

    def slowly(text: bytes) -> Any:
        if len(text) > MANY_VALUES:
            reading.set()
            assert go_on.wait(60)
        return load(text)

    monkeypatch.setattr(large_json, "load", slowly)
    with ThreadPoolExecutor(1) as aside:
        path, body = LARGE[door]
        large: Future[urllib3.BaseHTTPResponse] = aside.submit(post, service, path, body)
        assert reading.wait(60)
        assert post(service, ACT, OTHERS).status == 200
        go_on.set()
        assert large.result().status == 200


@pytest.mark.parametrize("read", [large_json.load, parse_json])
def test_no_call_of_the_json_library_gets_more_than_a_piece(monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    sizes, from_json = [], pydantic_core.from_json

    def remember(text: bytes, **options: Any) -> Any:
        sizes.append(len(text))
        return from_json(text, **options)

    monkeypatch.setattr(pydantic_core, "from_json", remember)
    rows = [[n, n + 1, n + 2] for n in range(100_000)]
    document = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [100_000, 3], "data": rows}]}
    read(pydantic_core.to_json(document))
    assert max(sizes) <= large_json.PIECE_BYTES + 2
    assert sum(sizes) > 1_000_000


def test_others_are_answered_while_another_process_holds_the_sessions_file(service: stream_service.Service) -> None:
    begun = post(service, f"/policies/{NAME}/sessions", b"").json()["session"]
    lock = locked(service)
    with ThreadPoolExecutor(2) as aside:
        step = aside.submit(post, service, ACT, OTHERS, **{"X-Session": begun, "X-Step": "1"})
        begins = aside.submit(post, service, f"/policies/{NAME}/sessions", b"")
        time.sleep(0.2)  # both wait for the lock, most probably
        assert post(service, ACT, OTHERS).status == 200
        assert not step.done()
        assert not begins.done()
        lock.execute("ROLLBACK")
        assert (step.result().status, begins.result().status) == (200, 201)
    lock.close()


def test_a_lock_that_is_never_released_is_an_error_in_the_end(
    service: stream_service.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actserve.server.sessions.LOCK_TIMEOUT_S", 0.1)
    lock = locked(service)
    refused = post(service, f"/policies/{NAME}/sessions", b"")
    lock.close()
    assert (refused.status, refused.json()["error"]["code"]) == (503, "sessions_unavailable")


def test_a_large_answer_is_written_outside_of_the_loop(
    service: stream_service.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, encode = [], wire.encode

    def remember(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return encode(*arguments)

    monkeypatch.setattr(wire, "encode", remember)
    assert post(service, ACT, OTHERS).status == 200
    assert len(post(service, *LARGE["act"]).json()["action"]) == MANY
    loop, other = threads
    assert loop is not other


def test_the_lag_of_the_loop_is_measured() -> None:
    async def scenario() -> None:
        async with LoopLag() as lag:
            await asyncio.sleep(EVERY_S / 2)
            time.sleep(5 * EVERY_S)  # this is what is measured
            await asyncio.sleep(0.01)
            assert lag.longest_ns > 3 * EVERY_S * 1e9
            assert sum(lag.lag_ns.counts) >= 1

    asyncio.run(scenario())


def test_many_requests_at_once_begin_in_several_turns_and_in_order() -> None:
    begun: list[list[int]] = []  # by turn

    async def inner(scope: Any, _receive: Any, _send: Any) -> None:
        begun[-1].append(scope["number"])

    async def run() -> None:
        loop, app, nothing = asyncio.get_running_loop(), BoundedTurnsMiddleware(inner), cast(Any, None)

        def count() -> None:  # the first callback of every turn
            begun.append([])
            loop.call_soon(count)

        loop.call_soon(count)
        tasks = [asyncio.create_task(app({"type": "http", "number": n}, nothing, nothing)) for n in range(1000)]
        await asyncio.sleep(0)
        tasks[500].cancel()
        await asyncio.wait(tasks)

    asyncio.run(run())
    assert [number for turn in begun for number in turn] == [n for n in range(1000) if n != 500]
    assert max(map(len, begun)) == MAX_BEGUN
