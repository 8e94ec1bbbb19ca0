"""HTTP as clients and proxies send it: upgrades, HEAD, half-closed connections, prefixes, dtypes."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from websockets.sync.client import connect

from actserve.client.remote_policy import RemotePolicy
from actserve.client.stream import Stream
from actserve.core.errors import UsageError
from actserve.core.settings import Settings
from actserve.core.signature import Array
from actserve.server.access.tokens import add_token
from actserve.server.app import create_app
from tests import stream_service
from tests.asgi import Caller
from tests.fake_policy import NAME
from tests.fastpath_service import FAST, ITEM_BYTES, PLAIN, Service, exchange, request, running
from tests.serving import port_of, serving
from tests.shipped import SHIPPED

BODY = bytes(range(ITEM_BYTES))
GET = b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n"
H2C = [
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAEAAEAAAAIAAAAB",
]
WEBSOCKET = [
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    f"Sec-WebSocket-Key: {'A' * 22}==",
]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(FAST) as up:
        yield up


@pytest.fixture(scope="module")
def stateful() -> Iterator[stream_service.Service]:
    with stream_service.running() as up:
        yield up


# upgrades


@pytest.mark.parametrize("headers", [H2C, WEBSOCKET, ["Connection: keep-alive, Upgrade", "Upgrade: TLS/1.0"]])
@pytest.mark.parametrize("pause_s", [0, 0.02])
def test_a_post_that_asks_for_an_upgrade_is_a_post(service: Service, headers: list[str], pause_s: float) -> None:
    data = request(BODY, headers=headers)
    cut = data.index(b"\r\n\r\n") + 4
    for pieces in ([data], [data[:cut], data[cut:]], [data[:cut], data[cut : cut + 3], data[cut + 3 :]], [data, data]):
        said = exchange(service, pieces, pause_s)
        expected = max(1, pieces.count(data))
        assert said.count(b"HTTP/1.1 ") == said.count(b"200 OK") == said.count(b'{"action":1}') == expected


def test_a_body_is_never_taken_for_a_request(service: Service) -> None:
    body = GET + bytes(ITEM_BYTES - len(GET) % ITEM_BYTES)
    said = exchange(service, [request(body, "/act?outputs=action", headers=H2C)])
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"alive" not in said
    chunked = request(b"", headers=[*H2C, "Transfer-Encoding: chunked"]).replace(b"Content-Length: 0\r\n", b"")
    said = exchange(service, [chunked + b"c\r\n" + BODY + b"\r\n0\r\n\r\n" + request(BODY)])
    assert said.count(b"HTTP/1.1 200 OK") == said.count(b'{"action":1}') == 2


def test_a_session_that_begins_with_an_upgrade_has_its_seed(stateful: stream_service.Service) -> None:
    begun = urllib3.request(
        "POST",
        f"{stateful.url}/policies/{NAME}/sessions",
        body=b'{"seed": 7}',
        headers={"Content-Type": "application/json", "Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"},
    )
    assert (begun.status, begun.json()["seed"]) == (201, 7)


def test_a_websocket_still_begins(stateful: stream_service.Service) -> None:
    with connect(stateful.url.replace("http", "ws") + f"/policies/{NAME}/stream", proxy=None) as stream:
        assert json.loads(stream.recv(10))["policy"] == NAME


def test_connect_is_refused(service: Service) -> None:
    said = exchange(service, [b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"])
    assert said.startswith(b"HTTP/1.1 4")


# a client that closes its side


def half_closed(port: int, data: bytes) -> bytes:
    """Everything that is answered to a client that has closed its side after `data`."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        said = b""
        while came := connection.recv(1 << 16):
            said += came
        return said


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize(
    ("data", "answers"),
    [
        (request(BODY), 1),
        (request(BODY) * 3, 3),
        (request(BODY, "/act?outputs=action"), 1),
        (request(BODY, "/act?outputs=action") * 3, 3),
        (request(BODY) + GET + request(BODY), 3),
        (GET, 1),
        (request(BODY, headers=H2C), 1),
        (request(BODY) + request(BODY)[:-2], 1),
        (request(BODY)[:-2], 0),
        (b"", 0),
    ],
)
def test_who_closes_its_side_gets_its_answers(slow: bool, data: bytes, answers: int) -> None:
    with running(FAST, slow=slow) as service:
        for _ in range(3):
            assert half_closed(service.port, data).count(b"HTTP/1.1 200 OK") == answers


# HEAD


@pytest.fixture(scope="module")
def whole() -> Iterator[Caller]:
    with Caller(create_app(Settings(store=str(SHIPPED), runtime="onnx"))) as call:
        call.wait(lambda: not call.app.state.registry.loading)
        yield call


PATHS = [
    "/healthz",
    "/readyz",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2",
    "/metrics",
    "/",
    "/policies/pong",
    "/docs",
]


@pytest.mark.parametrize("path", PATHS)
def test_head_is_answered_as_get_without_a_body(whole: Caller, path: str) -> None:
    head, get = whole("HEAD", path), whole("GET", path)
    assert (head.status, head.content) == (get.status, b"") == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_of_what_has_no_get_is_refused(whole: Caller) -> None:
    assert whole("HEAD", "/act").status == 405
    assert whole("HEAD", "/nothing").status == 404


def test_head_has_no_body_on_the_wire() -> None:
    with serving(create_app(Settings(store=str(SHIPPED), runtime="onnx"))) as server:
        url = f"http://127.0.0.1:{port_of(server)}"
        pool = urllib3.HTTPConnectionPool("127.0.0.1", port_of(server), maxsize=1)
        for _ in range(2):  # on one connection: a body would be the beginning of the next answer
            assert pool.request("HEAD", f"{url}/healthz").status == 200
        assert pool.num_connections == 1


# a prefix


@pytest.fixture(scope="module")
def below_robots() -> Iterator[str]:
    """The address of a service below /robots; a proxy has not removed the prefix."""
    settings = Settings(store=str(SHIPPED), runtime="onnx", root_path="/robots/")
    app = create_app(settings)
    with serving(app) as server:
        url = f"http://127.0.0.1:{port_of(server)}/robots"
        pool = urllib3.PoolManager()
        while pool.request("GET", url + "/readyz").status != 200:
            pass
        yield url


@pytest.mark.parametrize("proxy", ["keeps the prefix", "removes it"])
def test_the_service_works_below_a_prefix(below_robots: str, proxy: str) -> None:
    url = below_robots if proxy == "keeps the prefix" else below_robots.removesuffix("/robots")
    with RemotePolicy(url, "pong") as policy, RemotePolicy(url, "pong-lstm") as lstm:
        screen = np.zeros((210, 160, 3), np.uint8)
        assert isinstance(policy.act(screen), int)
        with lstm.session() as session, Stream(url, "pong-lstm") as stream:
            assert session.act(screen) == stream.act(screen)
    described = urllib3.request("GET", url + "/openapi.json").json()
    assert described["servers"] == [{"url": "/robots"}]
    assert "'/robots/openapi.json'" in urllib3.request("GET", url + "/docs").data.decode()


def test_the_page_has_relative_addresses(below_robots: str) -> None:
    page = urllib3.request("GET", below_robots + "/").data.decode()
    script = urllib3.request("GET", below_robots + "/page/page.js").data.decode()
    for text in (page, script):
        assert not [line for line in text.splitlines() if '"/' in line or "`/" in line]
    moved = urllib3.request("GET", below_robots, redirect=False)
    assert (moved.status, moved.headers["Location"]) == (308, "/robots/")


def test_a_prefix_protects_nothing_less(tmp_path: Path) -> None:
    add_token(tmp_path / "tokens", "me")
    settings = Settings(store=str(SHIPPED), runtime="onnx", root_path="/robots", tokens=tmp_path / "tokens")
    with Caller(create_app(settings)) as call:
        for path in ("/policies", "/robots/policies", "/robots/robots/healthz"):
            assert call("GET", path).status == 401, path
        assert call("GET", "/robots/healthz").status == call("GET", "/healthz").status == 200
        assert call("GET", "/robots/").headers["content-security-policy"].startswith("default-src 'self'; object-src")


@pytest.mark.parametrize("root_path", ["robots", "/ro bots", "//robots", "/robots?", "/../x/%2e"])
def test_a_prefix_that_is_none_is_refused(root_path: str) -> None:
    with pytest.raises(UsageError, match="ROOT_PATH"):
        Settings.from_environment({"ACTSERVE_ROOT_PATH": root_path})


# what the bytes are


def npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def typed(body: bytes, content_type: str, path: str = "/act") -> bytes:
    return request(body, path).replace(b"application/octet-stream", content_type.encode())


@pytest.mark.parametrize("http", [FAST, PLAIN])
def test_a_dtype_that_is_named_is_checked(http: str) -> None:
    with running(http) as service:
        for content_type, status in {
            "application/octet-stream; dtype=uint8": b"200 OK",
            'application/octet-stream;DTYPE="uint8"': b"200 OK",
            "application/octet-stream; charset=x": b"200 OK",
            "application/octet-stream; dtype=float64": b"422 ",
            "application/octet-stream; dtype=": b"422 ",
        }.items():
            said = exchange(service, [typed(BODY, content_type)])
            assert said.startswith(b"HTTP/1.1 " + status), (content_type, said)
            assert status == b"200 OK" or b"dtype 'uint8'" in said


def test_a_dtype_that_is_named_stays_on_the_fast_path(service: Service) -> None:
    before = len(service.requests)
    assert b"200 OK" in exchange(service, [typed(BODY, "application/octet-stream; dtype=uint8")])
    assert len(service.requests) == before


@pytest.mark.parametrize("http", [FAST, PLAIN])
def test_a_npy_file_is_no_raw_body(http: str) -> None:
    screen = np.arange(ITEM_BYTES, dtype=np.uint8).reshape(4, 3)
    body = npy(screen)
    body += bytes(-len(body) % ITEM_BYTES)  # as many bytes as some items
    with running(http) as service:
        for path in ("/act", "/act?outputs=action"):
            said = exchange(service, [request(body[: 8 * ITEM_BYTES], path)])
            assert said.startswith(b"HTTP/1.1 422 ")
            assert b"application/x-npy" in said
        assert b"200 OK" in exchange(service, [request(BODY)])


@pytest.mark.parametrize(
    ("array", "answer"),
    [
        (np.arange(12, dtype=np.uint8).reshape(4, 3), b'{"action":1}'),
        (np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(4, 3)), b'{"action":1}'),
        (np.stack([np.arange(12, dtype=np.uint8).reshape(4, 3)] * 2), b'{"action":[1,1]}'),
        (np.zeros((4, 3)), b"dtype 'uint8'"),
        (np.zeros((3, 4), np.uint8), b"got uint8[3, 4]"),
    ],
)
def test_a_npy_file_says_what_it_is(service: Service, array: Any, answer: bytes) -> None:
    assert answer in exchange(service, [typed(npy(array), "application/x-npy")])


@pytest.mark.parametrize(
    "damage", [lambda d: d[:20], lambda d: d[:-1], lambda d: d + b"x", lambda d: b"x" + d, lambda d: b""]
)
def test_a_damaged_npy_file_is_refused(service: Service, damage: Any) -> None:
    said = exchange(service, [typed(damage(npy(np.zeros((4, 3), np.uint8))), "application/x-npy")])
    assert said.startswith(b"HTTP/1.1 4")


def test_pickled_objects_are_refused(service: Service) -> None:
    file = io.BytesIO()
    np.save(file, np.array([{}]), allow_pickle=True)
    assert b"dtype 'uint8'" in exchange(service, [typed(file.getvalue(), "application/x-npy")])
