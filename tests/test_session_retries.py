"""Answers that are lost while a session begins or ends: nothing is left behind, and no exception is hidden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import urllib3

from actserve.client.operations import HttpRequest, HttpResponse
from actserve.client.remote_policy import RemotePolicy
from actserve.client.sequence import OipSequence
from actserve.client.transport import HttpConnection
from actserve.core.errors import ServiceUnreachable
from tests.fake_policy import NAME
from tests.stream_service import Service, running

X = np.array(1)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as up:
        yield up


@pytest.fixture
def policy(service: Service) -> Iterator[RemotePolicy]:
    with RemotePolicy(service.url) as remote:
        yield remote


def held(service: Service) -> int:
    app: Any = service.server.config.app
    count: int = app.state.sessions.statistics().sessions
    return count


def losing(monkeypatch: pytest.MonkeyPatch, method: str, path: str, answers: int) -> None:
    """The next answers to such requests are lost: the service has acted on them."""
    exchange, left = HttpConnection.exchange, [answers]

    def lose(connection: HttpConnection, request: HttpRequest) -> HttpResponse:
        response = exchange(connection, request)
        if request.method == method and path in request.path and left[0]:
            left[0] -= 1
            raise ServiceUnreachable("the answer is lost")
        return response

    monkeypatch.setattr(HttpConnection, "exchange", lose)


@pytest.mark.parametrize("seed", [None, 7])
def test_a_lost_beginning_leaves_no_session_behind(
    service: Service, policy: RemotePolicy, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    before = held(service)
    losing(monkeypatch, "POST", "/sessions", 2)
    with policy.session(seed=seed) as session:
        session.act(X)
        assert held(service) == before + 1
    assert held(service) == before


def test_a_lost_end_is_no_error(service: Service, policy: RemotePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    before = held(service)
    losing(monkeypatch, "DELETE", "/sessions", 1)
    with policy.session() as session:
        session.act(X)
    assert held(service) == before


@pytest.mark.parametrize("kind", ["session", "sequence"])
def test_the_exception_of_the_block_is_not_hidden(
    policy: RemotePolicy, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def fail() -> None:
        with policy.session() if kind == "session" else OipSequence(policy) as acting:
            acting.act(X)
            losing(monkeypatch, "DELETE" if kind == "session" else "POST", "", 99)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_an_end_that_fails_is_an_error(policy: RemotePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    def play() -> None:
        with policy.session() as session:
            session.act(X)
            losing(monkeypatch, "DELETE", "", 99)

    with pytest.raises(ServiceUnreachable):
        play()


def test_a_sequence_ends_with_its_block_whatever_happened(service: Service, policy: RemotePolicy) -> None:
    before = held(service)

    def fail() -> None:
        with OipSequence(policy) as sequence:
            sequence.act(X)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert held(service) == before


def begin(service: Service, body: bytes, **headers: str) -> tuple[int, Any]:
    answer = urllib3.request("POST", f"{service.url}/policies/{NAME}/sessions", body=body, headers=headers)
    return answer.status, answer.json()


def test_a_key_begins_one_session_for_each_client(service: Service) -> None:
    key = {"Idempotency-Key": "mine"}
    status, first = begin(service, b"{}", **key)
    assert status == 201
    assert begin(service, b"{}", **key)[1]["session"] == first["session"]
    assert begin(service, b'{"seed": %d}' % first["seed"], **key)[1]["session"] == first["session"]
    assert begin(service, b"{}", **key, **{"X-Owner": "another"})[1]["session"] != first["session"]
    assert begin(service, b"{}")[1]["session"] != first["session"]
    status, refused = begin(service, b'{"seed": %d}' % (first["seed"] ^ 1), **key)
    assert (status, refused["error"]["code"]) == (422, "invalid_request")
    assert begin(service, b"{}", **{"Idempotency-Key": "two words"})[0] == 422
    urllib3.request("DELETE", f"{service.url}/policies/{NAME}/sessions/{first['session']}")
    assert begin(service, b"{}", **key)[1]["session"] != first["session"], "one that has ended does not come back"
