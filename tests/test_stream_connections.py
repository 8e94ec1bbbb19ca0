"""Streams whose clients disconnect, idle or send invalid messages, and streams of a service that ends."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest

from actserve.client.stream import Stream
from actserve.core.settings import Settings
from actserve.server.fastpath.http_protocol import FIRST_HEAD_BYTES
from tests.fake_policy import seen
from tests.stream_service import Service, running
from tests.streams import UPGRADE, alone, answer, ask, closing, opened, raw
from tests.waiting import until


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as up:
        yield up


def test_a_message_that_is_too_large_is_refused_by_its_head(service: Service) -> None:
    with opened(service) as ws:
        ws.recv()
        ws.send(raw(1))
        answer(ws)
        ws.socket.sendall(struct.pack(">BBQ4x", 0x82, 0x80 | 127, 1 << 40))  # a binary frame of a terabyte
        code, reason = closing(ws)
    assert code == 1009
    assert "exceeds limit of 65600 bytes" in reason


def test_text_that_is_not_utf8_closes(service: Service) -> None:
    with opened(service) as ws:
        ws.recv()
        ws.send(b"\xff\xfe", text=True)
        assert closing(ws)[0] == 1007


@pytest.mark.parametrize("ahead", [b"\xff" * 20, b"\x82\x05hello", b"GET / HTTP/1.1\r\n\r\n"])
@pytest.mark.parametrize("key", ["AAAAAAAAAAAAAAAAAAAAAA==", "short"])
def test_nonsense_behind_a_handshake_is_no_error_of_ours(
    service: Service, ahead: bytes, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    head = (
        "GET /stream HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nX-Pad: "
    )
    head += "x" * (FIRST_HEAD_BYTES - len(head) - 4) + "\r\n\r\n"  # the rest comes in a read of its own
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head.encode() + ahead)
        with suppress(OSError):  # it has closed
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_what_a_client_sends_too_far_ahead_waits_in_the_sockets() -> None:
    message = '{"x": 1' + 60_000 * " " + "}"
    with running(slow=True) as service:
        gate = service.hold()
        with opened(service) as ws:
            ws.recv()
            sent = flood(ws.socket, struct.pack(">BBH4x", 0x81, 0x80 | 126, len(message)) + message.encode())
            (connection,) = service.connections
            assert connection.queue.qsize() <= 5 < sent, "it holds what one read of the socket gave"
            gate.set()
            model = alone()
            for _ in range(sent):
                assert answer(ws)["action"] == model.take(seen(1))["action"][0]


def flood(bare: socket.socket, frame: bytes) -> int:
    """Send it over and over until nothing goes any more; how many whole ones went."""
    bare.settimeout(2.0)
    taken = 0
    try:
        while True:
            taken += bare.send(frame[taken % len(frame) :])
    except TimeoutError:
        return taken // len(frame)
    finally:
        bare.settimeout(None)


def test_a_drain_answers_what_was_taken_in_and_says_restart() -> None:
    model = alone()
    with running(slow=True) as service:
        gate = service.hold()
        with opened(service) as busy, opened(service) as idle:
            busy.recv()
            idle.recv()
            busy.send(raw(1))
            until(lambda: service.registry.policies[1].statistics().waiting == 1)
            service.drain()
            assert closing(idle) == (1012, "service restart")
            gate.set()
            assert answer(busy) == (1, model.take(seen(1))["action"][0])
            assert closing(busy) == (1012, "service restart")


def test_a_killed_client_leaves_nothing_behind() -> None:
    with running(slow=True) as service:
        gate = service.hold()
        for _ in range(3):
            socket_ = upgraded(service)
            socket_.sendall(struct.pack(">BB4x", 0x82, 0x88) + raw(1))
            until(lambda: service.registry.policies[1].statistics().waiting > 0)
            kill(socket_)
        kill(upgraded(service))
        gate.set()
        until(lambda: not service.connections and not service.tasks)
        assert service.registry.policies[1].statistics().waiting == 0


def test_a_client_that_reads_nothing_and_answers_no_ping_is_dropped() -> None:
    with running(ws_ping_interval=2.0, ws_ping_timeout=0.5) as service, upgraded(service) as stuck:
        (connection,) = service.connections
        stuck.settimeout(1.0)
        with suppress(TimeoutError):
            while connection.writable.is_set():
                stuck.sendall(100 * struct.pack(">BB4x", 0x82, 0x80))  # the errors that these get fill every buffer
        assert service.connections
        until(lambda: not service.connections and not service.tasks)


def test_a_stream_outlives_the_time_that_idle_connections_are_kept() -> None:
    """Before its first message, while it is used, and between two messages."""
    with running(timeout_keep_alive=1) as service, Stream(service.url) as stream:
        for pause_s in (2.2, 0.4, 0.4, 0.4, 2.2):
            time.sleep(pause_s)
            stream.act(np.array(5))
        assert stream.steps == 5


def test_an_idle_stream_is_closed() -> None:
    with running(Settings(session_idle_s=2)) as service, opened(service) as ws:
        ws.recv()
        assert ask(ws, raw(1))[0] == 1
        assert closing(ws) == (1001, "idle for 2 s")


def upgraded(service: Service) -> socket.socket:
    """A stream's bare socket after the hello, with a small receive buffer."""
    bare = socket.socket()
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    bare.connect(("127.0.0.1", int(service.url.rsplit(":", 1)[1])))
    head = ["GET /stream HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in UPGRADE.items())]
    bare.sendall("\r\n".join([*head, "", ""]).encode())
    heard = b""
    while b'"idle_s"' not in heard:
        heard += bare.recv(65536)
    return bare


def kill(bare: socket.socket) -> None:
    """Close it as a process does that is killed with unread data: by a reset."""
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    bare.close()
