"""Admission: every door has the same limits, and charges the same. Each rule is a test over all doors."""

from __future__ import annotations

import ast
import asyncio
import gc
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from actserve.core.settings import Settings
from actserve.server.memory import RESERVED_BYTES
from tests import doors
from tests.doors import ALL, BATCHES, ITEM_BYTES, RATE, REQUESTS, Service, screens
from tests.fastpath_service import NAME
from tests.waiting import until

SERVER = Path(__file__).parent.parent / "app" / "actserve" / "server"
TOO_LARGE = {"413", "RESOURCE_EXHAUSTED", "error"}
UNAVAILABLE = {"503", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "error"}
LIMITED = {"429", "RESOURCE_EXHAUSTED", "error"}
MAX_ITEMS = 3


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with doors.running(tmp_path_factory.mktemp("doors"), Settings(max_items=MAX_ITEMS)) as up:
        yield up


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = Settings(max_body_bytes=150_000, max_items=1)
    with doors.running(tmp_path_factory.mktemp("small"), settings) as up:
        yield up


@pytest.fixture
def charged(tmp_path: Path) -> Iterator[Service]:
    with doors.running(tmp_path, tokens=True) as up:
        yield up


def test_only_admission_calls_a_policy_or_a_batcher() -> None:
    """`Policy.act`, `Batcher.submit`, `admit` and `enter` are called in one module of the server."""
    for file in SERVER.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            if not isinstance(call, ast.Attribute) or file.name == "admission.py":
                continue
            owner = ast.unparse(call.value)
            if call.attr in ("submit", "enter", "admit") and "batcher" in owner:
                pytest.fail(f"{file.name} calls {owner}.{call.attr}")
            if call.attr == "act" and "policy" in owner.lower():
                pytest.fail(f"{file.name} calls {owner}.act")


@pytest.mark.parametrize("door", ALL)
def test_one_item_is_answered(service: Service, door: str) -> None:
    assert ALL[door](service, screens(2)[1:]) == doors.Result("200", actions=(1,))


@pytest.mark.parametrize("door", BATCHES)
def test_a_batch_is_answered(service: Service, door: str) -> None:
    assert BATCHES[door](service, screens(MAX_ITEMS)) == doors.Result("200", actions=(0, 1, 2))


@pytest.mark.parametrize("door", BATCHES)
def test_too_many_items_are_refused(service: Service, door: str) -> None:
    result = BATCHES[door](service, screens(MAX_ITEMS + 1))
    assert result.status in TOO_LARGE, result
    assert f"at most {MAX_ITEMS} items; got {MAX_ITEMS + 1}" in result.text


@pytest.mark.parametrize("door", BATCHES)
def test_too_large_a_body_is_refused(small: Service, door: str) -> None:
    result = BATCHES[door](small, screens(16))
    assert result.status in TOO_LARGE, result
    expected = "150,000 bytes" if "gRPC" not in door else "larger than max"
    assert expected in result.text
    assert BATCHES[door](small, screens(1)).status == "200"


@pytest.mark.parametrize("door", ALL)
def test_a_token_is_needed(charged: Service, door: str) -> None:
    charged.token = None
    try:
        result = ALL[door](charged, screens(1))
    except Exception as refused:  # a WebSocket's handshake
        assert "401" in str(refused)
    else:
        assert result.status in ("401", "UNAUTHENTICATED"), result
    assert charged.registry.runtime.sizes == []


@pytest.mark.parametrize("items", [1, 5])
@pytest.mark.parametrize("door", ALL)
def test_each_item_is_charged_once(charged: Service, door: str, items: int) -> None:
    if items > 1 and door not in BATCHES:
        return
    assert ALL[door](charged, screens(items)).status == "200"
    assert charged.left == RATE - items - REQUESTS.get(door, 1) + 1


@pytest.mark.parametrize("door", ALL)
def test_a_rate_is_enforced(charged: Service, door: str) -> None:
    assert BATCHES["fast path"](charged, screens(int(RATE))).status == "200"
    try:
        result = ALL[door](charged, screens(1))
    except Exception as refused:  # a WebSocket's handshake
        assert "429" in str(refused)
    else:
        assert result.status in LIMITED, result
    assert sum(charged.registry.runtime.sizes) <= RATE


@pytest.mark.parametrize("door", ALL)
def test_a_full_queue_refuses(tmp_path: Path, door: str) -> None:
    with (
        doors.running(tmp_path, Settings(max_waiting=1), slow=True) as service,
        ThreadPoolExecutor(1) as other,
    ):
        gate = service.hold()
        waiting = other.submit(BATCHES["fast path"], service, screens(1))
        until(lambda: service.registry._live[NAME].statistics().waiting == 1)
        result = ALL[door](service, screens(1))
        assert result.status in UNAVAILABLE, result
        assert "waiting" in result.text
        gate.set()
        assert waiting.result().status == "200"


@pytest.mark.parametrize("door", ALL)
def test_a_policy_that_closes_refuses(tmp_path: Path, door: str) -> None:
    with doors.running(tmp_path) as service:
        batcher = service.registry._live[NAME].batcher
        asyncio.run_coroutine_threadsafe(batcher.close(), batcher._loop).result(60)
        result = ALL[door](service, screens(1))
        assert result.status in UNAVAILABLE, result
        assert "closing" in result.text


def test_a_compressed_body_that_the_fast_path_leaves_is_charged_once(charged: Service) -> None:
    """Two screens in zstd: the fast path expands one at most, and leaves the rest to the route."""
    assert BATCHES["zstd"](charged, screens(2)).status == "200"
    assert charged.left == RATE - 2


def test_parameters_are_as_many_as_the_items_of_a_large_batch(tmp_path: Path) -> None:
    """More items than the arena has rows: pixels, epsilon and noise have the same number of rows."""
    with doors.running(tmp_path) as service:
        arena = service.registry._live[NAME].batcher.arena
        assert arena is not None
        count = min(32, len(arena.memory) + 2)
        arena._defaults_size, arena._defaults = 0, {}
        arena._extend_defaults(count // 2)
        expected = tuple(int(i % 5) for i in range(count))
        assert BATCHES["fast path"](service, screens(count)).actions == expected
        assert service.routed == [], "the batch has taken the fast path"


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("items", [1, 30])
def test_bodies_that_have_not_come_take_little_memory(tmp_path: Path, items: int) -> None:
    """200 connections announce 600 MB in bodies of 30 screens, send 100 bytes each, and wait."""
    head = (
        f"POST /act HTTP/1.1\r\nHost: here\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {items * ITEM_BYTES}\r\n\r\n"
    ).encode()
    with doors.running(tmp_path) as service, ExitStack() as stack:
        assert BATCHES["fast path"](service, screens(items)).status == "200"
        gc.collect()
        before = resident_bytes()
        for _ in range(200):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=60))
            connection.sendall(head + bytes(100))
        for _ in range(3):  # others are answered meanwhile
            assert BATCHES["fast path"](service, screens(1)).status == "200"
        assert service.admission.memory.reserved_bytes <= RESERVED_BYTES
        assert resident_bytes() - before < RESERVED_BYTES
        last = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=60))
        last.sendall(head + screens(items).tobytes())
        assert b"200 OK" in last.recv(1000), "memory that grows with the body takes it"
        stack.close()
        until(lambda: service.admission.memory.reserved_bytes == 0)


def test_headers_that_every_proxy_adds_keep_a_request_on_the_fast_path(service: Service) -> None:
    before = len(service.routed)
    headers = {
        "X_Forwarded_For": "10.0.0.1", "X_Real_IP": "10.0.0.1", "Forwarded": "for=10.0.0.1", "Cookie": "a=1",
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "baggage": "a=1",
        "X_Request_Id": "abc-1", "Accept_Encoding": "gzip",
    }  # fmt: skip
    response = service.post("/act", screens(1).tobytes(), "application/octet-stream", **headers)
    assert (response.status, response.json(), response.headers["x-request-id"]) == (200, {"action": 0}, "abc-1")
    assert len(service.routed) == before


def test_items_of_real_size_arrive_whole(service: Service) -> None:
    rng = np.random.default_rng(0)
    items = rng.integers(0, 255, (MAX_ITEMS, *doors.SHAPE), np.uint8)  # a first byte of 255 makes the program fail
    expected = tuple(int(total) for total in items.reshape(MAX_ITEMS, -1).sum(1, dtype=np.int64) % 5)
    for door in BATCHES.values():
        assert door(service, items).actions == expected
