"""Many bad clients at once, at a service in a process of its own. After each of them it is as it
was: it answers, and has no connection, no file and no memory more than before."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from actserve.cli.tools import local_service as local
from actserve.cli.tools.local_service import LocalService
from actserve.client.remote_policy import RemotePolicy
from actserve.core.signature import Array
from tests.shipped import SHIPPED
from tests.waiting import until

SCREEN_BYTES = 210 * 160 * 3
HEAD = (
    "POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/octet-stream\r\nContent-Length: {length}\r\n\r\n"
).format
ACT = HEAD(path="/policies/pong/act", length=SCREEN_BYTES).encode()
GROWTH_MB = 32  # what the allocator may keep


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    with local.serve(SHIPPED, "--runtime", "onnx") as running:
        yield running


def connect(service: LocalService) -> socket.socket:
    address = urlsplit(service.url)
    return socket.create_connection((address.hostname, address.port), timeout=60)


def files(service: LocalService) -> int:
    (worker,) = service.workers
    return len(os.listdir(f"/proc/{worker}/fd"))


def rss_mb(service: LocalService) -> float:
    (worker,) = service.workers
    pages = int(Path(f"/proc/{worker}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def bearing(service: LocalService, screens: Array) -> Iterator[Callable[[], None]]:
    """`act()` asks as a good client does; at the end the service is as it was."""
    worker = service.workers
    with RemotePolicy(service.url, "pong") as remote:
        actions = [remote.act(screen) for screen in screens[:64]]

        def act() -> None:
            assert [remote.act(screen) for screen in screens[:64]] == actions

        opened, before_mb = files(service), rss_mb(service)
        yield act
        until(lambda: files(service) <= opened)
        act()
        until(lambda: rss_mb(service) < before_mb + GROWTH_MB)
    assert service.workers == worker


def test_clients_that_send_a_byte_now_and_then_keep_nobody_waiting(service: LocalService, screens: Array) -> None:
    with bearing(service, screens) as act, ExitStack() as stack:
        slow = [stack.enter_context(closing(connect(service))) for _ in range(200)]
        request = ACT + bytes(SCREEN_BYTES)
        for number, connection in enumerate(slow):
            connection.sendall(request[: number * 500])
        for index in range(3):
            for number, connection in enumerate(slow):
                connection.sendall(request[number * 500 + index :][:1])
            act()
            time.sleep(0.3)


def test_clients_that_never_read_are_not_written_to_for_ever(service: LocalService, screens: Array) -> None:
    """They send many requests with large answers. Answers that no client reads are not computed."""
    large = HEAD(path="/policies/pong/act?outputs=action,action_value", length=256 * SCREEN_BYTES).encode()
    with bearing(service, screens) as act, ExitStack() as stack:
        deaf = [stack.enter_context(closing(connect(service))) for _ in range(20)]
        for number, connection in enumerate(deaf):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            request = ACT + bytes(SCREEN_BYTES) if number % 2 else large + bytes(256 * SCREEN_BYTES)
            sent = 0
            for _ in range(2000):
                try:
                    sent += connection.send(request[sent % len(request) :])
                except BlockingIOError:
                    break
        before_mb = rss_mb(service)
        for _ in range(5):
            act()
            time.sleep(0.1)
        assert rss_mb(service) < before_mb + 2 * GROWTH_MB


def test_clients_that_go_at_every_stage_leave_nothing(service: LocalService, screens: Array) -> None:
    whole = ACT + screens[0].tobytes()
    stream = (
        b"GET /policies/pong/stream HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    framed = stream + b"\x82\xff" + SCREEN_BYTES.to_bytes(8, "big") + bytes(4) + screens[0].tobytes()
    session = b"POST /policies/pong-lstm/sessions HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
    with bearing(service, screens) as act:
        for request in (whole, framed, session):
            for sent in sorted({*range(0, min(len(request), 300), 7), *range(0, len(request), 2999), len(request)}):
                for reset in (False, True):
                    with connect(service) as connection:
                        if reset:
                            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        connection.sendall(request[:sent])
            act()


def test_thousands_of_connections_are_borne(service: LocalService, screens: Array) -> None:
    """10,000, where this process may have so many files open. A second crowd needs no more memory than the first."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = min(9_990, most - 500)

    def gather(stack: ExitStack) -> None:
        for number in range(count):
            connection = stack.enter_context(connect(service))
            connection.sendall(ACT[: number % len(ACT)])

    opened = files(service)
    with ExitStack() as stack:
        gather(stack)
    until(lambda: files(service) <= opened)
    with bearing(service, screens) as act, ExitStack() as stack:
        gather(stack)
        act()
        for _ in range(count // 50):
            with connect(service) as another:
                another.sendall(ACT + screens[0].tobytes())
                assert another.recv(100).startswith(b"HTTP/1.1 200 OK")
        act()
