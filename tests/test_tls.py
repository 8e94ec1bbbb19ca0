"""TLS, for real: the lane, the routes, streams and our own clients behind a certificate."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actserve.client.remote_policy import RemotePolicy
from actserve.client.stream import Stream
from actserve.core.errors import ServiceUnreachable, UsageError
from actserve.core.settings import Settings
from actserve.loadtest.generator import load
from actserve.server.access.tls import check
from tests import certificates, fastpath_service, stream_service
from tests.command_line import actserve
from tests.fastpath_service import FAST, NAME, Service, request

BODY = bytes(range(12))
GET = b"GET /policies HTTP/1.1\r\nHost: h\r\n\r\n"


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path

    @property
    def options(self) -> dict[str, Any]:
        return {"ssl_certfile": self.cert, "ssl_keyfile": self.key}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(*certificates.make(tmp_path_factory.mktemp("tls")))


@pytest.fixture(scope="module")
def secure(pair: Pair) -> Iterator[Service]:
    with fastpath_service.running(FAST, **pair.options) as up:
        yield up


def connected(service: Service, pair: Pair) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(pair.cert))
    return context.wrap_socket(service.connect(), server_hostname="127.0.0.1")


def answers(connection: socket.socket, count: int) -> bytes:
    data = b""
    while data.count(b'{"action":') < count:
        came = connection.recv(1 << 16)
        assert came, data
        data += came
    return data


def test_the_lane_takes_requests_behind_tls(secure: Service, pair: Pair) -> None:
    before = len(secure.requests)
    with connected(secure, pair) as connection:
        for _ in range(3):
            connection.sendall(request(BODY))
            assert answers(connection, 1).endswith(b'{"action":1}')
        connection.sendall(request(BODY) * 50)  # many in one record
        assert answers(connection, 50).count(b'{"action":1}') == 50
    assert len(secure.requests) == before


def test_pieces_make_no_difference(secure: Service, pair: Pair) -> None:
    with connected(secure, pair) as connection:
        for cut in range(1, len(request(BODY)), 5):
            connection.sendall(request(BODY)[:cut])  # each a record of its own
            connection.sendall(request(BODY)[cut:])
            assert answers(connection, 1).endswith(b'{"action":1}')
        for byte in request(BODY):
            connection.sendall(bytes([byte]))
        assert answers(connection, 1).endswith(b'{"action":1}')


def test_fastpath_and_routes_take_turns(secure: Service, pair: Pair) -> None:
    with connected(secure, pair) as connection:
        connection.sendall(request(BODY) + request(BODY * 2) + request(BODY))
        assert answers(connection, 3).count(b'{"action":1}') == 2
        connection.sendall(GET + request(BODY))
        assert b'"default":"tiny"' in answers(connection, 1)


def test_a_refused_body_is_forgotten_and_the_connection_goes_on(pair: Pair) -> None:
    with (
        fastpath_service.running(FAST, Settings(max_waiting=1), **pair.options) as service,
        connected(service, pair) as refused,
    ):
        with fastpath_service.overloaded(service, lambda: connected(service, pair)):
            refused.sendall(request(BODY)[:-3])
            assert refused.recv(1000).startswith(b"HTTP/1.1 503 ")
            refused.sendall(BODY[-3:])
            for _ in range(3):
                refused.sendall(request(BODY) * 3000)  # more than is decrypted at a time
                answer = b""
                while answer.count(b'"limit":1}}}') < 3000:
                    came = refused.recv(1 << 16)
                    assert came, answer[-1000:]
                    answer += came
        refused.sendall(request(BODY))
        assert answers(refused, 1).endswith(b'{"action":1}')


def test_whoever_speaks_no_tls_is_let_go(secure: Service) -> None:
    with secure.connect() as connection:
        connection.sendall(request(BODY))
        with suppress(ConnectionResetError):
            assert b"action" not in connection.recv(1000)


def test_our_own_clients_speak_tls(pair: Pair, secure: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"https://127.0.0.1:{secure.port}"
    with pytest.raises(ServiceUnreachable), RemotePolicy(url):  # a certificate that no client trusts
        pass
    monkeypatch.setenv("SSL_CERT_FILE", str(pair.cert))
    with RemotePolicy(url) as policy:
        assert policy.name == NAME
        assert policy.act(np.frombuffer(BODY, np.uint8).reshape(4, 3)) == 1
    report = load(url, concurrency=2, duration_s=0.5, processes=1)
    assert report.requests > 0
    assert not report.errors
    with stream_service.running(**pair.options) as service:
        with Stream(service.url.replace("http", "https")) as stream:
            one = [stream.act(np.array(3, np.int64)) for _ in range(5)]
        with stream_service.running() as plain, Stream(plain.url) as stream:
            assert [stream.act(np.array(3, np.int64)) for _ in range(5)] == one


def test_what_cannot_be_used_is_said_before_anything_starts(pair: Pair, tmp_path: Path) -> None:
    check(Settings())
    check(Settings(tls_cert=pair.cert, tls_key=pair.key))
    with pytest.raises(UsageError, match="needs both"):
        check(Settings(tls_cert=pair.cert))
    with pytest.raises(UsageError, match="cannot be used for TLS"):
        check(Settings(tls_cert=pair.cert, tls_key=pair.cert))
    result = actserve("serve", "--tls-cert", str(tmp_path / "no"), "--tls-key", str(pair.key), "--store", str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
