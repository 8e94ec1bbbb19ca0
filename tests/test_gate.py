"""Access over real sockets in both lanes, and who owns a session."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from actserve.client.remote_policy import RemotePolicy
from actserve.client.stream import Stream
from actserve.core.errors import ServiceError
from actserve.core.settings import Settings
from actserve.server.access.tokens import add_token
from tests import fastpath_service, stream_service, waiting
from tests.fake_policy import NAME
from tests.fastpath_service import FAST, PLAIN, Service, request

X = np.array(3, np.int64)
NOSNIFF = [("X-Content-Type-Options", "nosniff")]  # as `actserve serve` has it


@dataclass(frozen=True)
class Guarded:
    service: Any
    file: Path
    mine: str
    yours: str

    def ask(self, method: str, path: str, token: str | None = None, headers: Any = (), body: Any = None) -> Any:
        given = dict(headers) | ({} if token is None else {"Authorization": f"Bearer {token}"})
        return urllib3.request(method, self.service.url + path, headers=given, body=body, retries=False)


@pytest.fixture(scope="module", params=[FAST, PLAIN])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """`/act` behind tokens, by the lane and without."""
    file = tmp_path_factory.mktemp("access") / "tokens"
    mine, yours = add_token(file, "me"), add_token(file, "you")
    with fastpath_service.running(request.param, Settings(tokens=file), headers=NOSNIFF) as up:
        yield Guarded(up, file, mine, yours)


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """Sessions, streams and the Open Inference Protocol behind tokens."""
    file = tmp_path_factory.mktemp("access") / "tokens"
    mine, yours = add_token(file, "me"), add_token(file, "you", sessions=3)
    with stream_service.running(Settings(tokens=file)) as up:
        yield Guarded(up, file, mine, yours)


def answers(connection: socket.socket, count: int) -> bytes:
    """The next so many, whole."""
    data = b""
    while True:
        heads = [part.partition(b"\r\n\r\n") for part in data.split(b"HTTP/1.1 ")[1:]]
        lengths = [int(re.findall(rb"content-length: (\d+)", head)[0]) for head, end, _ in heads if end]
        if len(heads) == len(lengths) == count and len(heads[-1][2]) == lengths[-1]:
            return data
        came = connection.recv(1 << 16)
        if not came:
            return data
        data += came


def ask(service: Service, data: bytes, count: int = 1) -> bytes:
    with service.connect() as connection:
        connection.sendall(data)
        return answers(connection, count)


def asked(token: str | None, *headers: str) -> bytes:
    return request(headers=[*headers, *([] if token is None else [f"Authorization: Bearer {token}"])])


def test_nobody_acts_without_a_token(guarded: Guarded) -> None:
    service, mine = guarded.service, guarded.mine
    assert ask(service, asked(mine)).startswith(b"HTTP/1.1 200 OK\r\n")
    for wrong in (
        asked(None),
        asked("actserve_guess"),
        asked(mine + "x"),
        asked(mine, "Authorization: Bearer actserve_guess"),
        request(headers=[f"Authorization: Basic {mine}"]),
        request(headers=[f"X-Authorization: Bearer {mine}"]),
        request(path=f"/act?token={mine}"),
    ):
        answer = ask(service, wrong)
        assert answer.startswith(b"HTTP/1.1 401 Unauthorized\r\n"), wrong
        assert b"\r\nwww-authenticate: Bearer\r\n" in answer
        assert b'"code":"unauthorized"' in answer
        assert mine.encode() not in answer


def test_a_refused_request_leaves_the_connection_in_order(guarded: Guarded) -> None:
    came = ask(guarded.service, asked(None) + asked(guarded.mine) + asked("wrong") + asked(guarded.yours), 4)
    assert [part[:3] for part in came.split(b"HTTP/1.1 ")[1:]] == [b"401", b"200", b"401", b"200"]


def test_whoever_has_a_token_goes_by_the_lane(guarded: Guarded) -> None:
    before = len(guarded.service.requests)
    assert b"200 OK" in ask(guarded.service, asked(guarded.mine))
    assert len(guarded.service.requests) - before == (guarded.service.http == PLAIN)


@pytest.mark.parametrize(
    "path", ["/policies", "/policies/tiny", "/docs", "/openapi.json", "/nothing", "/healthz/", "//healthz"]
)
def test_every_route_asks(guarded: Guarded, path: str) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: h\r\n".encode()
    assert ask(guarded.service, head + b"\r\n").startswith(b"HTTP/1.1 401 ")
    let_in = ask(guarded.service, head + f"Authorization: Bearer {guarded.mine}\r\n\r\n".encode())
    assert not let_in.startswith(b"HTTP/1.1 401 ")


def test_probes_need_no_token(guarded: Guarded) -> None:
    for path in (b"/healthz", b"/readyz"):
        answer = ask(guarded.service, b"GET " + path + b" HTTP/1.1\r\nHost: h\r\n\r\n")
        assert b"200 OK" in answer


def test_every_answer_is_what_it_says_it_is(guarded: Guarded) -> None:
    for asking in (asked(guarded.mine), asked(None), b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n", b"nonsense\r\n\r\n"):
        answer = ask(guarded.service, asking).lower()
        assert b"\r\nx-content-type-options: nosniff\r\n" in answer
        assert b"\r\nserver:" not in answer
        assert b"access-control" not in answer


@pytest.mark.parametrize("http", [FAST, PLAIN])
def test_a_rate_is_kept(http: str, tmp_path: Path) -> None:
    hasty, calm = add_token(tmp_path / "tokens", "hasty", rate=3), add_token(tmp_path / "tokens", "calm")
    with fastpath_service.running(http, Settings(tokens=tmp_path / "tokens")) as service:
        came = ask(service, asked(hasty) * 8 + asked(calm) * 8, 16)
        codes = [part[:3] for part in came.split(b"HTTP/1.1 ")[1:]]
        assert codes[:3] == [b"200"] * 3
        assert b"429" in codes[3:8]
        assert codes[8:] == [b"200"] * 8, "nobody pays for another"
        assert b"\r\nretry-after: 1\r\n" in came
        assert b'"code":"rate_limited"' in came
        time.sleep(1.0)
        batch = request(bytes(12 * 5), headers=[f"Authorization: Bearer {hasty}"])
        came = ask(service, batch + asked(hasty), 2)
        assert [part[:3] for part in came.split(b"HTTP/1.1 ")[1:]] == [b"200", b"429"], "a batch is its observations"


@pytest.mark.parametrize("http", [FAST, PLAIN])
def test_a_token_is_revoked_and_another_let_in_while_the_service_runs(http: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    old = add_token(file, "robot")
    with fastpath_service.running(http, Settings(tokens=file)) as service, service.connect() as kept:
        kept.sendall(asked(old))
        assert b"200 OK" in answers(kept, 1)
        file.write_text("")
        new = add_token(file, "robot")
        waiting.until(lambda: b"200 OK" in ask(service, asked(new)), 10)
        kept.sendall(asked(old))
        assert answers(kept, 1).startswith(b"HTTP/1.1 401 ")
        time.sleep(1.2)
        before = len(service.requests)
        assert b"200 OK" in ask(service, asked(new))
        assert len(service.requests) - before == (http == PLAIN), "the lane forgot what it had read of this head"


def test_a_session_of_another_token_does_not_exist(stateful: Guarded) -> None:
    mine, yours, ask = stateful.mine, stateful.yours, stateful.ask
    sessions = f"/policies/{NAME}/sessions"
    id_ = ask("POST", sessions, mine).json()["session"]
    step: dict[str, Any] = {"headers": {"X-Session": id_, "Content-Type": "application/json"}, "body": b'{"x": 1}'}
    assert ask("POST", f"/policies/{NAME}/act", mine, **step).status == 200
    never = ask("GET", f"{sessions}/{id_[:-4]}AAA=", yours)
    for refused in (
        ask("GET", f"{sessions}/{id_}", yours),
        ask("DELETE", f"{sessions}/{id_}", yours),
        ask("POST", f"/policies/{NAME}/act", yours, **step),
        ask("POST", f"/policies/{NAME}/act", yours, step["headers"] | {"X-Owner": "me", "X-Step": "1"}, step["body"]),
    ):
        assert (refused.status, refused.data) == (404, never.data), "the answer of an id that never was"
    assert ask("GET", f"{sessions}/{id_}").status == 401
    assert ask("GET", sessions, yours, {"X-Owner": "me"}).json() == {"sessions": []}
    assert [session["session"] for session in ask("GET", sessions, mine).json()["sessions"]] == [id_]
    assert ask("GET", f"{sessions}/{id_}", mine).json()["step"] == 1, "and nothing has moved"
    assert ask("DELETE", f"{sessions}/{id_}", mine).status == 204
    assert ask("GET", f"{sessions}/{id_}", mine).status == 410
    assert ask("GET", f"{sessions}/{id_}", yours).status == 404, "not even that there was one"


def test_a_session_begun_before_tokens_were_needed_is_nobodys(stateful: Guarded) -> None:
    with stream_service.running() as open_to_all:
        url = f"{open_to_all.url}/policies/{NAME}/sessions"
        id_ = urllib3.request("POST", url).json()["session"]
    assert stateful.ask("GET", f"/policies/{NAME}/sessions/{id_}", stateful.mine).status == 404


def test_whoever_begins_too_many_sessions_loses_his_own(stateful: Guarded) -> None:
    mine, yours, ask = stateful.mine, stateful.yours, stateful.ask
    sessions = f"/policies/{NAME}/sessions"
    kept = ask("POST", sessions, mine).json()["session"]
    begun = [ask("POST", sessions, yours).json()["session"] for _ in range(5)]
    assert [ask("GET", f"{sessions}/{id_}", yours).status for id_ in begun] == [410, 410, 200, 200, 200]
    assert len(ask("GET", sessions, yours).json()["sessions"]) == 3
    assert ask("GET", f"{sessions}/{kept}", mine).status == 200


def test_a_sequence_of_another_token_does_not_exist(stateful: Guarded) -> None:
    def infer(token: str, **parameters: Any) -> Any:
        x = {"name": "x", "datatype": "INT64", "shape": [1], "data": [5]}
        document = {"inputs": [x], "parameters": {"sequence_id": 7, **parameters}}
        headers = {"Authorization": f"Bearer {token}"}
        return urllib3.request("POST", f"{stateful.service.url}/v2/models/{NAME}/infer", json=document, headers=headers)

    assert infer(stateful.mine, sequence_start=True).status == 200
    refused = infer(stateful.yours)
    assert (refused.status, list(refused.json())) == (404, ["error"])
    assert infer(stateful.mine).status == 200
    without = urllib3.request("GET", f"{stateful.service.url}/v2/models/{NAME}")
    assert (without.status, list(without.json())) == (401, ["error"]), "the protocol's own shape"
    assert without.headers["WWW-Authenticate"] == "Bearer"
    assert urllib3.request("GET", f"{stateful.service.url}/v2/health/live").status == 200


def test_a_browsers_stream_has_its_token_in_a_subprotocol(stateful: Guarded) -> None:
    where = stateful.service.url.replace("http", "ws") + "/stream"
    offered = [Subprotocol("actserve"), Subprotocol(f"bearer.{stateful.mine}")]
    with connect(where, subprotocols=offered, proxy=None) as ws:
        assert ws.subprotocol == "actserve"
    for wrong in ([Subprotocol("actserve")], [Subprotocol("bearer.nobody")], [*offered, Subprotocol("bearer.other")]):
        with pytest.raises(InvalidStatus) as refused:
            connect(where, subprotocols=wrong, proxy=None)
        assert refused.value.response.status_code == 401


def test_a_stream_asks_for_a_token_and_counts_its_steps(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    hasty = add_token(file, "hasty", rate=4)
    with stream_service.running(Settings(tokens=file)) as service:
        with pytest.raises(ServiceError, match="401 unauthorized"), Stream(service.url):
            pass
        with Stream(service.url, token=hasty) as stream:
            limited = 0
            for _ in range(12):
                try:
                    stream.act(X)
                except ServiceError as error:
                    assert (error.status, error.reason) == (429, "rate_limited")
                    limited += 1
            assert limited >= 5
            taken = stream.steps
            time.sleep(0.6)
            stream.act(X)
            assert stream.steps == taken + 1, "what was refused has moved nothing"
            file.write_text("")
            time.sleep(1.2)
            urllib3.request("GET", f"{service.url}/policies")
            with pytest.raises(ServiceError, match="401 unauthorized"):
                stream.act(X)


def test_a_browser_opens_no_stream_for_pages_of_others() -> None:
    with stream_service.running(Settings(cors_origins="https://friend.example")) as service:
        where = service.url.replace("http", "ws") + "/stream"
        for origin in ("https://evil.example", "null", "http://127.0.0.1", service.url.replace("127", "128")):
            with pytest.raises(InvalidStatus) as refused:
                connect(where, origin=Origin(origin), proxy=None)
            assert refused.value.response.status_code == 403, origin
        for friend in (None, Origin(service.url), Origin("https://friend.example")):
            with connect(where, origin=friend, proxy=None) as ws:
                assert "policy" in ws.recv()


@pytest.mark.parametrize("http", [FAST, PLAIN])
def test_pages_of_others_may_ask_if_they_are_named(http: str, tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens", "robot")
    settings = Settings(tokens=tmp_path / "tokens", cors_origins="https://a.example,https://b.example")
    preflight = (
        b"OPTIONS /act HTTP/1.1\r\nHost: h\r\nOrigin: https://%s\r\nAccess-Control-Request-Method: POST\r\n"
        b"Access-Control-Request-Headers: authorization,content-type\r\n\r\n"
    )
    with fastpath_service.running(http, settings) as service:
        assert b"access-control-allow-origin: https://b.example" in ask(service, preflight % b"b.example")
        assert b"allow-origin" not in ask(service, preflight % b"evil.example")
        acted = ask(service, asked(token, "Origin: https://a.example"))
        assert acted.startswith(b"HTTP/1.1 200 ")
        assert b"access-control-allow-origin: https://a.example" in acted
        refused = ask(service, asked(None, "Origin: https://a.example"))
        assert refused.startswith(b"HTTP/1.1 401 ")
        assert b"access-control-allow-origin: https://a.example" in refused
        assert b"allow-origin" not in ask(service, asked(token, "Origin: https://evil.example"))
    with fastpath_service.running(http) as service:
        assert ask(service, preflight % b"a.example").startswith(b"HTTP/1.1 405 ")


def test_what_is_wrong_inside_stays_inside(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error is answered without its details."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("the password in /etc/secret is hunter2")

    monkeypatch.setattr(type(guarded.service.registry), "describe", fail)
    asking = f"GET /policies/tiny HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {guarded.mine}\r\n\r\n".encode()
    answer = ask(guarded.service, asking)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert answer.endswith(
        b'{"error":{"code":"internal","message":"the service failed on this request; its log says why","detail":null}}'
    )


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/no/such", 404), ("PUT", "/act", 405)])
def test_routes_that_are_not_there_have_the_one_shape(guarded: Guarded, method: str, path: str, status: int) -> None:
    asking = f"{method} {path} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {guarded.mine}\r\n\r\n".encode()
    answer = ask(guarded.service, asking)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b'{"error":{"code":"' in answer


def test_our_own_clients_have_a_token(stateful: Guarded) -> None:
    with RemotePolicy(stateful.service.url, token=stateful.mine) as policy:
        assert policy.name == NAME
        with policy.session() as session:
            session.act(X)
    with pytest.raises(ServiceError, match="401 unauthorized"), RemotePolicy(stateful.service.url):
        pass
