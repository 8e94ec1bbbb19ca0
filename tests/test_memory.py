"""The memory that all connections hold together is bounded: more is refused, and the service goes on."""

from __future__ import annotations

import asyncio
import resource
import selectors
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from actserve.core.errors import MemoryFull
from actserve.core.settings import Settings
from actserve.engine.malloc import allocate
from actserve.server.admission import Admission
from actserve.server.fastpath.fast_path import FastPath
from actserve.server.memory import CONNECTION_BYTES, STREAM_BYTES, Memory
from actserve.server.sessions import SessionLimits, Sessions
from tests import stream_service
from tests.fake_policy import NAME
from tests.fastpath_service import FAST, ITEM_BYTES, SCREENS, OnePolicy, exchange, request, running
from tests.waiting import until

BODY = bytes(ITEM_BYTES)
LIMIT = 4 << 20
SETTINGS = Settings(max_connection_bytes=LIMIT, max_body_bytes=1 << 20)


def memory_of(service: Any) -> Memory:
    admission: Admission = service.server.config.app.state.admission
    return admission.memory


def test_memory_is_taken_and_given_back() -> None:
    memory = Memory(114)
    memory.take(60)
    with pytest.raises(MemoryFull, match="100 bytes"):
        memory.take(41)
    with memory.taken(40):
        assert not memory.reserve(1)
    memory.measured_bytes = 35
    with pytest.raises(MemoryFull):
        memory.take(6)
    memory.give_back(60)
    assert memory.reserve(14)
    assert not memory.reserve(1), "a part is all that announced bodies may have"
    memory.release(14)
    assert memory.taken_bytes == 0


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_a_large_body_takes_memory_as_it_comes() -> None:
    mega = 1 << 20
    before = resident_bytes()
    body = allocate(64 * mega)
    assert resident_bytes() - before < 8 * mega
    body[: 32 * mega] = 1
    assert abs(resident_bytes() - before - 32 * mega) < 8 * mega
    del body
    assert resident_bytes() - before < 8 * mega


@pytest.mark.parametrize("content_type", ["application/octet-stream", "application/json"])
def test_bodies_that_come_slowly_are_bounded_all_together(content_type: str) -> None:
    """On the fast path, where a batch grows with the bytes that come, and on the routes."""
    size = 8 * SCREENS.observations[0].item_bytes
    head = f"POST /act HTTP/1.1\r\nHost: h\r\nContent-Type: {content_type}\r\nContent-Length: {size}\r\n\r\n".encode()
    with running(FAST, SETTINGS, signature=SCREENS) as service, ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in range(10)]  # 800 KB each, and 4 MB for all
        for connection in slow:
            with suppress(OSError):  # a refused one is closed
                connection.sendall(head + bytes(size - 1000))
        selector = stack.enter_context(selectors.DefaultSelector())
        for connection in slow:
            selector.register(connection, selectors.EVENT_READ)
        refused = 0
        while refused < 5:  # the others wait for the rest of their bodies
            for key, _ in selector.select(60):
                connection = next(open_ for open_ in slow if open_ is key.fileobj)
                with suppress(ConnectionResetError):  # the rest of the body was not read
                    assert connection.recv(1000).startswith(b"HTTP/1.1 503 ")
                selector.unregister(connection)
                refused += 1
            assert memory_of(service).taken_bytes <= memory_of(service).limit_bytes < LIMIT
        stack.close()
        until(lambda: memory_of(service).taken_bytes == 0)
        assert b"200 OK" in exchange(service, [request(bytes(size // 8))])


def test_connections_are_bounded_by_their_memory() -> None:
    with running(FAST, Settings(max_connection_bytes=1 << 20)) as service, ExitStack() as stack:
        room = memory_of(service).limit_bytes // CONNECTION_BYTES
        for _ in range(room):
            connection = stack.enter_context(service.connect())
            connection.sendall(request(BODY))
            assert b"200 OK" in connection.recv(1000)
        with service.connect() as refused:
            assert b'"memory_full"' in refused.recv(1000)
        connection.close()
        until(lambda: memory_of(service).taken_bytes == (room - 1) * CONNECTION_BYTES)
        assert b"200 OK" in exchange(service, [request(BODY)])


def test_streams_are_bounded_by_their_memory() -> None:
    with stream_service.running(Settings(max_connection_bytes=1 << 20)) as service, ExitStack() as stack:
        url = service.url.replace("http", "ws") + f"/policies/{NAME}/stream"
        refused: InvalidStatus | None = None
        for _ in range((1 << 20) // STREAM_BYTES + 1):
            try:
                stack.enter_context(connect(url, proxy=None)).recv(10)
            except InvalidStatus as error:
                refused = error
        assert refused is not None
        assert refused.response.status_code == 503
        assert b"memory_full" in (refused.response.body or b"")
        stack.close()
        until(lambda: memory_of(service).taken_bytes == 0)


def test_who_does_not_read_is_not_read(tmp_path: Path) -> None:
    """Unread answers are bounded: once the buffers are full, the service reads no further request of that client."""
    with (
        running(FAST, SETTINGS, uds=str(tmp_path / "socket")) as service,  # whose buffers are small
        socket.socket(socket.AF_UNIX) as connection,
    ):
        connection.connect(str(tmp_path / "socket"))
        connection.settimeout(2)
        piece, sent = request(BODY) * 100, 0
        with suppress(TimeoutError):
            while sent < 200 << 20:
                sent += connection.send(piece)
        assert sent < 50 << 20
        held = [open_.held_bytes for open_ in service.server.server_state.connections if hasattr(open_, "held_bytes")]
        assert max(held) < 1 << 20
        connection.settimeout(60)
        answers = b""
        while answers.count(b"200 OK") < 1000:  # it goes on when it is read
            answers += connection.recv(1 << 16)


class Holding:
    """A connection that holds so many bytes."""

    def __init__(self, held_bytes: int) -> None:
        self.held_bytes = held_bytes
        self.abandoned = False

    def close_if_idle(self) -> None:
        pass

    def abandon(self) -> None:
        self.abandoned = True


def test_the_largest_are_closed_while_all_hold_too_much() -> None:
    async def scenario() -> None:
        settings = Settings(max_connection_bytes=1 << 20)
        admission = Admission(settings)
        sessions = Sessions(Path("nowhere"), SessionLimits())
        fast_path = FastPath(OnePolicy(settings, slow=False), admission, sessions, settings)
        connections = [Holding(size << 10) for size in (100, 900, 300, 50, 400)]
        fast_path.connections |= set(connections)
        await fast_path._watch_connections()
        assert [connection.abandoned for connection in connections] == [False, True, False, False, False]
        assert admission.memory.measured_bytes == 850 << 10
        with pytest.raises(MemoryFull):
            admission.memory.take(200 << 10)

    asyncio.run(scenario())


def test_requests_that_are_sent_ahead_are_bounded() -> None:
    """Uvicorn parses all that has come, and makes each request an object. Nobody sends so many on purpose."""
    get = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
    with running(FAST, SETTINGS, signature=SCREENS) as service:
        assert exchange(service, [get * 100]).count(b"200 OK") == 100
        with service.connect() as connection, suppress(OSError):
            connection.sendall(get * 1500)  # in one piece
            answers = b""
            while part := connection.recv(1 << 16):
                answers += part
            assert b"400 Bad Request" in answers
            assert answers.count(b"200 OK") < 1500
        until(lambda: memory_of(service).taken_bytes == 0)
