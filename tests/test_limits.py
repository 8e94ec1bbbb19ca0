"""Everything is bounded: a request that is too large is refused soon, with a reason, and the service goes on."""

from __future__ import annotations

import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import urllib3
from backports import zstd

from actserve.core.settings import Settings
from actserve.wire.payload import MAX_VALUES
from tests import stream_service
from tests.fake_policy import NAME
from tests.fastpath_service import FAST, ITEM_BYTES, Service, request, running
from tests.waiting import until

BODY = bytes(ITEM_BYTES)
HEAD = b"POST /act HTTP/1.1\r\nHost: h\r\nContent-Type: application/octet-stream\r\n"
SOON_S = 1.0  # for an answer to whatever comes
ROOM_BYTES = 10 << 20  # for what the sockets between us keep, and a piece or two


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(FAST, Settings(max_body_bytes=1 << 20)) as up:
        yield up


@pytest.fixture(scope="module")
def stateful() -> Iterator[stream_service.Service]:
    with stream_service.running() as up:
        yield up


def poured(service: Service, beginning: bytes, piece: bytes) -> tuple[int, bytes]:
    """Send `piece` without end -> how many bytes the service took before it refused, and its answer."""
    taken, said = 0, b""
    with service.connect() as connection:
        connection.sendall(beginning)
        connection.settimeout(10)
        with suppress(ConnectionError):
            while taken < 200 << 20:
                taken += connection.send(piece)
        with suppress(ConnectionError):
            while came := connection.recv(1 << 16):
                said += came
    return taken, said


@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (b"GET /" + b"a" * 5000, b"a" * 1000),
        (b"POST /act HTTP/1.1\r\n", b"A: b\r\n" * 1000),
        (b"GET /healthz HTTP/1.1\r\nA: ", b"b" * 1000),
        (b"GET /healthz HTTP/1.1\r\n", b"b" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"extension" * 100),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"A: b\r\n" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nA: ", b"b" * 1000),
    ],
    ids=["path", "headers", "value", "name", "extension of a chunk", "trailers", "trailer"],
)
def test_what_is_no_body_is_bounded(service: Service, beginning: bytes, piece: bytes) -> None:
    taken, said = poured(service, beginning, piece)
    assert taken < ROOM_BYTES, "what the sockets' buffers hold, and no more"
    assert not said or said.startswith(b"HTTP/1.1 4")
    assert b"200 OK" in answer(service, request(BODY))


def test_a_head_that_is_too_large_is_told_so(service: Service) -> None:
    for size, status in ((60_000, b"200 OK"), (70_000, b"431 ")):
        large = b"GET /healthz HTTP/1.1\r\nHost: h\r\nA: " + b"b" * size
        assert status in answer(service, large + b"\r\n\r\n" * (status == b"200 OK"))


def test_trailers_are_no_headers(stateful: stream_service.Service) -> None:
    """Bytes behind a body cannot name a session, or anything else."""
    chunked = (
        f"POST /policies/{NAME}/act HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        'Transfer-Encoding: chunked\r\nTrailer: X-Session\r\n\r\n8\r\n{"x": 1}\r\n0\r\nX-Session: nobodys\r\n\r\n'
    ).encode()
    with socket.create_connection(("127.0.0.1", int(stateful.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(chunked)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_declared_body_is_refused_before_it_comes(service: Service) -> None:
    assert b"413 " in answer(service, HEAD + b"Content-Length: 99999999999\r\n\r\n")


def test_a_body_without_an_end_is_refused_and_then_cut_off() -> None:
    piece = b"3e8\r\n" + b"a" * 1000 + b"\r\n"
    with (
        running(FAST, Settings(max_body_bytes=10_000, request_timeout_s=1)) as service,
        service.connect() as connection,
    ):
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + piece * 12)
        assert b"413 " in connection.recv(1000)
        end = time.monotonic() + 10
        with suppress(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(piece)
                time.sleep(0.01)
        assert time.monotonic() < end


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_a_bomb_is_refused(service: Service, coding: str) -> None:
    zeros = bytes(64 << 20)
    body = {
        "gzip": lambda: zlib.compress(zeros, wbits=31),
        "deflate": lambda: zlib.compress(zeros),
        "zstd": lambda: zstd.compress(zeros),
    }[coding]()
    assert len(body) < 100_000
    began = time.monotonic()
    head = HEAD + f"Content-Encoding: {coding}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    assert b"413 " in answer(service, head + body)
    assert time.monotonic() - began < SOON_S


DEEP = b"[" * 100_000 + b"]" * 100_000
JSON_BOMBS: dict[str, bytes] = {
    "deep": b'{"x":' + DEEP + b"}",
    "deep objects": b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
    "a little deep": b'{"x":' + b"[" * 150 + b"]" * 150 + b"}",
    "as deep as arrays go": b'{"x":' + b"[" * 64 + b"1" + b"]" * 64 + b"}",
    "many values": b'{"x":[' + b"1," * (2 * MAX_VALUES) + b"1]}",
    "as many values as may be": b'{"x":[' + b"1," * (MAX_VALUES - 10) + b"1]}",
    "many lists": b'{"x":[' + b"[]," * (8 << 20) + b"[]]}",
    "many names": b"{" + b",".join(b'"%d":1' % number for number in range(1 << 20)) + b"}",
    "one long text": b'{"x":[' + b"1," * 500_000 + b'"' + b"a" * (4 << 20) + b'"]}',
    "a large number": b'{"x":' + b"9" * (1 << 20) + b"}",
    "a large exponent": b'{"x":1e999999999}',
    "a large shape": b'{"x":{"dtype":"int64","shape":[' + b"9," * 1000 + b'9],"b64":""}}',
    "many dimensions": b'{"x":{"dtype":"int64","shape":[' + b"1," * 1000 + b'1],"b64":"AAAAAAAAAAA="}}',
    "a shape of nothing": b'{"x":{"dtype":"int64","shape":[0,99999999999999999999],"b64":""}}',
    "surrogates": b'{"x":"\\ud800"}',
    "names of surrogates": b'{"\\ud800":1}',
    "NUL": b'{"x\\u0000":1}',
}
PATHS = {
    "act": f"/policies/{NAME}/act",
    "infer": f"/v2/models/{NAME}/infer",
    "sessions": f"/policies/{NAME}/sessions",
    "index": "/v2/repository/index",
}


@pytest.mark.parametrize("where", PATHS)
@pytest.mark.parametrize("name", JSON_BOMBS)
def test_json_of_any_shape_is_answered_soon(stateful: stream_service.Service, name: str, where: str) -> None:
    body = JSON_BOMBS[name]
    if where == "infer":
        body = body.replace(b'{"x":', b'{"inputs":[{"name":"x","datatype":"INT64","shape":[1],"data":', 1)[:-1] + b"}]}"
    began = time.monotonic()
    said = urllib3.request(
        "POST", stateful.url + PATHS[where], body=body, headers={"Content-Type": "application/json"}, retries=False
    )
    assert 400 <= said.status < 500 or where == "index", said.data[:200]
    assert len(said.data) < 4096, "and it is not all repeated"
    assert time.monotonic() - began < 2 * SOON_S


NAMES = [
    "..", "../..", "../../etc/passwd", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f..%2fetc%2fpasswd",
    "%2fetc%2fpasswd", "....//....//etc/passwd", "..%5c..%5cetc", "%00", f"{NAME}%00", f"{NAME}%2f..", f"{NAME}/..",
    "%252e%252e%252f", "a" * 5000, "%ff%fe", f"{NAME.upper()}", f" {NAME}".replace(" ", "%20"), "con", "~root", "*",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_looked_up_and_never_joined(stateful: stream_service.Service, name: str) -> None:
    """Names of policies, versions, sessions and models, in every path that has one."""
    for method, path in (
        ("GET", f"/policies/{name}"),
        ("POST", f"/policies/{name}/act"),
        ("POST", f"/policies/{NAME}/versions/{name}/act"),
        ("POST", f"/policies/{name}/sessions"),
        ("GET", f"/policies/{NAME}/sessions/{name}"),
        ("DELETE", f"/policies/{NAME}/sessions/{name}"),
        ("GET", f"/v2/models/{name}"),
        ("GET", f"/v2/models/{NAME}/versions/{name}"),
        ("GET", f"/{name}"),
    ):
        status, said = plainly(stateful.url, method, path)
        assert status in (404, 405, 307, 400, 415) or (name, status) == (f"{NAME}/..", 200), (method, path, said)
        assert b"root:x:" not in said
        assert b"Traceback" not in said


def plainly(url: str, method: str, path: str) -> tuple[int, bytes]:
    """The path as it is: a library would put it in order first."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()
        )
        said = b""
        while came := connection.recv(1 << 16):
            said += came
    return int(said[9:12]), said


def test_connections_are_bounded() -> None:
    with running(FAST, Settings(max_connections=5)) as service, ExitStack() as stack:
        connections = [stack.enter_context(service.connect()) for _ in range(5)]
        for connection in connections:
            connection.sendall(request(BODY))
            assert b"200 OK" in connection.recv(1000)
        for _ in range(20):
            with service.connect() as refused:
                said = refused.recv(1000)
                assert said.startswith(b"HTTP/1.1 503 ")
                assert b'"code":"too_many_connections"' in said
                with suppress(ConnectionError):
                    assert refused.recv(1000) == b""
        for connection in connections:
            connection.sendall(request(BODY))
            assert b"200 OK" in connection.recv(1000)
        connections[0].close()
        until(lambda: len(service.server.server_state.connections) == 4)
        assert b"200 OK" in answer(service, request(BODY))


def answer(service: Any, data: bytes) -> bytes:
    with service.connect() as connection:
        connection.sendall(data)
        said: bytes = connection.recv(1 << 16)
        return said
