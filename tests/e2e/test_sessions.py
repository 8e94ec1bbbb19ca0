"""Sessions over real sockets, with two worker processes, and a recurrent policy as it was exported."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from actserve.cli.tools import local_service as local
from actserve.cli.tools.local_service import LocalService
from actserve.core.errors import ServiceUnreachable
from actserve.core.signature import Array
from tests.exported import exported, merged
from tests.publishing import republish
from tests.waiting import until

SESSIONS = "/policies/gru/sessions"
ACT = "/policies/gru/act"
STEPS = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gru`@1 and @2, recurrent, and `epsilon-greedy`, random; as .onnx."""
    stores = [exported(f"tests.policies:{kind}", ["onnx"]) for kind in ("gru", "epsilon_greedy")]
    made = merged(stores, tmp_path_factory.mktemp("sessions"))
    republish(made.resolve("gru"), made)
    return made.root


@pytest.fixture(scope="module")
def service(store: Path) -> Iterator[LocalService]:
    with local.serve(store, "--workers", "2") as running:
        _wait_for_both(running)
        yield running


@pytest.fixture(scope="module")
def observations() -> Array:
    return np.random.default_rng(3).standard_normal((STEPS, 4)).astype(np.float32)


class Connection:
    """One kept connection."""

    def __init__(self, service: LocalService) -> None:
        address = urlsplit(service.url)
        assert address.hostname
        self._http = http.client.HTTPConnection(address.hostname, address.port, timeout=120)

    def close(self) -> None:
        self._http.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """`body`: bytes, or what is sent as JSON. Headers with _ for -. -> status, JSON or bytes, headers."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            named["Content-Type"], body = "application/json", json.dumps(body).encode()
        self._http.request(method, path, body, named)
        response = self._http.getresponse()
        content = response.read()
        is_json = response.getheader("Content-Type") == "application/json"
        return response.status, json.loads(content) if is_json else content, dict(response.getheaders())

    def begin(self, document: Any = None, path: str = SESSIONS, **headers: str) -> str:
        status, answer, _ = self.ask("POST", path, document, **headers)
        assert status == 201, answer
        return str(answer["session"])

    def step(self, id_: str, observation: Array, number: int, **more: Any) -> tuple[int, Any, dict[str, str]]:
        body = {"observation": observation.tolist(), **more}
        return self.ask("POST", ACT + "?outputs=action,action_value", body, X_Session=id_, X_Step=str(number))

    def worker(self, service: LocalService) -> int:
        """The process at the other end: the one that has the socket whose peer is ours."""
        self.ask("GET", "/healthz")
        peer, port = (f"{name[1]:04X}" for name in (self._http.sock.getsockname(), self._http.sock.getpeername()))
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        (inode,) = (row[9] for row in rows if (row[1][-4:], row[2][-4:], row[3]) == (port, peer, "01"))
        for worker in service.workers:
            with suppress(OSError):  # it has just ended
                if f"socket:[{inode}]" in map(os.readlink, Path(f"/proc/{worker}/fd").iterdir()):
                    return worker
        raise AssertionError("no worker has this connection")


def _wait_for_both(service: LocalService) -> None:
    """`local.serve` waits for one worker."""
    ready: set[int] = set()
    while len(ready) < 2:
        with closing(Connection(service)) as connection:
            if connection.ask("GET", "/readyz")[0] == 200:
                ready.add(connection.worker(service))


@pytest.fixture
def connection(service: LocalService) -> Iterator[Connection]:
    with closing(Connection(service)) as made:
        yield made


@pytest.fixture
def pair(service: LocalService) -> Iterator[list[Connection]]:
    """Two connections to two different workers."""
    kept: dict[int, Connection] = {}
    spare: list[Connection] = []
    while len(kept) < 2:
        made = Connection(service)
        kept.setdefault(made.worker(service), made)
        spare.append(made)
        assert len(spare) < 200, "one worker takes every connection"
    yield list(kept.values())
    for made in spare:
        made.close()


@pytest.fixture(scope="module")
def expected(service: LocalService, observations: Array) -> list[Any]:
    """The episode with its state carried by the client."""
    answers: list[Any] = []
    with closing(Connection(service)) as connection:
        state: dict[str, Any] = {}
        for observation in observations:
            document = {"observation": observation.tolist(), **state}
            status, answer, _ = connection.ask("POST", ACT + "?outputs=action,action_value", document)
            assert status == 200
            answers.append({name: answer.pop(name) for name in ("action", "action_value")})
            state = answer
            assert state, "a recurrent policy"
    return answers


def test_steps_that_alternate_between_two_workers_are_the_episode(
    pair: list[Connection], observations: Array, expected: list[Any]
) -> None:
    id_ = pair[0].begin()
    for number, observation in enumerate(observations, 1):
        status, answer, headers = pair[number % 2].step(id_, observation, number)
        assert (status, answer) == (200, expected[number - 1])
        assert headers["x-step"] == str(number)
        assert "x-replayed" not in headers
    for connection in pair:
        status, described, _ = connection.ask("GET", f"{SESSIONS}/{id_}")
        assert (status, described["step"], described["version"]) == (200, STEPS, 2)
        status, answer, headers = connection.step(id_, observations[0], STEPS)
        assert (status, answer, headers["x-replayed"]) == (200, expected[-1], "1")


@pytest.mark.parametrize("cut", ["after the request", "in its body"])
def test_a_client_that_drops_its_connection_in_mid_step_tries_again_and_plays_on(
    service: LocalService, connection: Connection, observations: Array, expected: list[Any], cut: str
) -> None:
    id_ = connection.begin()
    address = urlsplit(service.url)
    for number, observation in enumerate(observations, 1):
        body = json.dumps({"observation": observation.tolist()}).encode()
        head = (
            f"POST {ACT} HTTP/1.1\r\nHost: x\r\nX-Session: {id_}\r\nX-Step: {number}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port)) as dropped:
            dropped.sendall(head.encode() + (body if cut == "after the request" else body[:20]))
        status, answer, _ = connection.step(id_, observation, number)
        assert (status, answer) == (200, expected[number - 1])


def test_one_step_sent_to_both_workers_at_once_is_done_once(
    pair: list[Connection], observations: Array, expected: list[Any]
) -> None:
    id_ = pair[0].begin()
    for number, observation in enumerate(observations, 1):
        answers: list[Any] = [None, None]

        def send(index: int, number: int = number, observation: Array = observation, into: Any = answers) -> None:
            into[index] = pair[index].step(id_, observation, number)

        threads = [threading.Thread(target=send, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer[:2] for answer in answers] == [(200, expected[number - 1])] * 2
        assert sum("x-replayed" in headers for _, _, headers in answers) == 1


def test_many_sessions_at_once_on_both_workers(service: LocalService, observations: Array, expected: list[Any]) -> None:
    wrong: list[Any] = []

    def play() -> None:
        with closing(Connection(service)) as one, closing(Connection(service)) as other:
            id_ = one.begin()
            for number, observation in enumerate(observations, 1):
                found = (one, other)[number % 2].step(id_, observation, number)[:2]
                if found != (200, expected[number - 1]) and not _close(found, expected[number - 1]):
                    wrong.append((number, found))

    threads = [threading.Thread(target=play) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _close(found: tuple[int, Any], expected: Any) -> bool:
    """In a batch the last bits of a value may differ; the action may not."""
    status, answer = found
    return (
        status == 200
        and answer["action"] == expected["action"]
        and np.allclose(answer["action_value"], expected["action_value"], atol=1e-5)
    )


def test_a_retry_may_ask_for_other_outputs_in_another_encoding(connection: Connection, observations: Array) -> None:
    id_ = connection.begin()
    status, answer, _ = connection.step(id_, observations[0], 1)
    status, raw, headers = connection.ask(
        "POST", ACT, b"not even JSON", X_Session=id_, X_Step="1", Accept="application/octet-stream"
    )
    assert (status, headers["x-replayed"]) == (200, "1")
    assert np.frombuffer(raw, np.int64) == answer["action"]


def test_seeded_sessions_are_the_same_and_steps_are_not(connection: Connection) -> None:
    path = "/policies/epsilon-greedy/"
    begun = [connection.begin({"seed": 7, "exploration": "random"}, path + "sessions") for _ in range(2)]
    found = [
        [connection.ask("POST", path + "act", {"observation": [0, 0, 0, 0]}, X_Session=id_)[1] for _ in range(STEPS)]
        for id_ in begun
    ]
    assert found[0] == found[1]
    assert len({answer["action"] for answer in found[0]}) > 1
    assert len({answer["seed"] for answer in found[0]}) == STEPS
    carried = {"observation": [0, 0, 0, 0], "exploration": "random", "seed": found[0][5]["seed"]}
    assert connection.ask("POST", path + "act", carried)[1] == found[0][5]


def test_a_session_stays_on_its_version(connection: Connection, observations: Array) -> None:
    id_ = connection.begin(path="/policies/gru/versions/1/sessions")
    assert connection.ask("GET", f"{SESSIONS}/{id_}")[1]["version"] == 1
    body = {"observation": observations[0].tolist()}
    for path in (ACT, "/policies/gru/versions/1/act"):
        assert connection.ask("POST", path, body, X_Session=id_)[0] == 200
    status, answer, _ = connection.ask("POST", "/policies/gru/versions/2/act", body, X_Session=id_)
    assert (status, answer["error"]["message"]) == (422, "a session stays on its version: expected 1; got 2")


def test_the_session_may_be_named_in_the_body(connection: Connection, observations: Array, expected: list[Any]) -> None:
    id_ = connection.begin()
    for number in (1, 2):
        body = {"observation": observations[number - 1].tolist(), "session": id_}
        status, answer, _ = connection.ask("POST", ACT + "?outputs=action,action_value", body, X_Step=str(number))
        assert (status, answer) == (200, expected[number - 1])
    status, answer, _ = connection.ask("POST", ACT, {**body, "session": id_[:-1]}, X_Session=id_)
    assert (status, answer["error"]["code"]) == (422, "invalid_request")


def test_owners_list_their_sessions_and_end_them(connection: Connection) -> None:
    mine = [connection.begin(X_Owner="me") for _ in range(2)]
    connection.begin(X_Owner="you")
    status, listed, _ = connection.ask("GET", SESSIONS, X_Owner="me")
    assert (status, [session["session"] for session in listed["sessions"]]) == (200, mine)
    assert connection.ask("GET", SESSIONS)[0] == 422
    assert connection.ask("GET", "/policies/nobody/sessions", X_Owner="me")[0] == 404
    assert connection.ask("DELETE", f"{SESSIONS}/{mine[0]}")[:2] == (204, b"")
    assert len(connection.ask("GET", SESSIONS, X_Owner="me")[1]["sessions"]) == 1
    for method, path in (("GET", f"{SESSIONS}/{mine[0]}"), ("DELETE", f"{SESSIONS}/{mine[0]}")):
        status, answer, _ = connection.ask(method, path)
        assert (status, answer["error"]["code"]) == (410, "session_expired")


ZEROS = [0.0, 0.0, 0.0, 0.0]
REFUSED: dict[str, tuple[Any, dict[str, str], int, str]] = {
    "a gap": ({"observation": ZEROS}, {"X_Step": "3"}, 409, "step_conflict"),
    "step 0": ({"observation": ZEROS}, {"X_Step": "0"}, 409, "step_conflict"),
    "no number": ({"observation": ZEROS}, {"X_Step": "one"}, 422, "invalid_request"),
    "a made-up id": ({"observation": ZEROS}, {"X_Session": "A" * 32}, 404, "unknown_session"),
    "an empty id": ({"observation": ZEROS}, {"X_Session": ""}, 404, "unknown_session"),
    "state": ({"observation": ZEROS, "recurrent_state": [[0.0] * 8]}, {}, 422, "invalid_request"),
    "a batch": ({"observation": [ZEROS]}, {}, 422, "invalid_request"),
    "a seed": ({"observation": ZEROS, "seed": 1}, {}, 422, "invalid_request"),
    "an exploration": ({"observation": ZEROS, "exploration": "deterministic"}, {}, 422, "invalid_request"),
    "a wrong shape": ({"observation": ZEROS[:3]}, {}, 422, "invalid_tensor"),
    "not JSON": (b"{", {"Content_Type": "application/json"}, 400, "malformed_body"),
    "two outputs raw": ({"observation": ZEROS}, {"Accept": "application/octet-stream"}, 406, "not_acceptable"),
}


@pytest.mark.parametrize(("body", "headers", "status", "code"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_moves_nothing(
    connection: Connection, body: Any, headers: dict[str, str], status: int, code: str
) -> None:
    id_ = connection.begin()
    path = ACT + "?outputs=action,action_value"
    found, answer, _ = connection.ask("POST", path, body, **{"X_Session": id_, **headers})
    assert (found, answer["error"]["code"]) == (status, code)
    if status == 409:
        assert answer["error"]["detail"]["expected"] == 1
    assert connection.ask("GET", f"{SESSIONS}/{id_}")[1]["step"] == 0


@pytest.mark.parametrize(
    ("path", "document", "status"),
    [
        (SESSIONS, {"seed": -1}, 400),
        (SESSIONS, {"seed": True}, 400),
        (SESSIONS, {"exploration": "wild"}, 400),
        (SESSIONS, {"exploration": "random"}, 422),
        (SESSIONS, {"policy": "gru"}, 400),
        (SESSIONS, [1], 400),
        (SESSIONS, b"{", 400),
        (SESSIONS, b"x" * 5000, 413),
        ("/policies/nobody/sessions", None, 404),
        ("/policies/gru/versions/9/sessions", None, 404),
        ("/policies/gru/versions/x/sessions", None, 404),
    ],
)
def test_a_session_that_cannot_begin(connection: Connection, path: str, document: Any, status: int) -> None:
    found, answer, _ = connection.ask("POST", path, document)
    assert found == status
    assert answer["error"].keys() == {"code", "message", "detail"}


def test_a_step_needs_its_session_and_its_policy(connection: Connection) -> None:
    status, answer, _ = connection.ask("POST", ACT, {"observation": ZEROS}, X_Step="1")
    assert (status, answer["error"]["code"]) == (422, "invalid_request")
    id_ = connection.begin()
    status, answer, _ = connection.ask("POST", "/policies/epsilon-greedy/act", {"observation": ZEROS}, X_Session=id_)
    assert (status, answer["error"]["code"]) == (404, "unknown_session")


def environment(**settings: object) -> dict[str, str]:
    return {**os.environ, **{f"ACTSERVE_{name.upper()}": str(value) for name, value in settings.items()}}


def test_sessions_outlive_a_restart_and_a_killed_worker(
    store: Path, tmp_path: Path, observations: Array, expected: list[Any]
) -> None:
    kept = environment(sessions=tmp_path / "sessions.sqlite")
    with local.serve(store, "--workers", "2", environment=kept) as service:
        _wait_for_both(service)
        connection = Connection(service)
        id_ = connection.begin()
        assert connection.step(id_, observations[0], 1)[:2] == (200, expected[0])
        os.kill(connection.worker(service), signal.SIGKILL)
        connection.close()
        _wait_for_both(service)
        with closing(Connection(service)) as another:
            assert another.step(id_, observations[1], 2)[:2] == (200, expected[1])
    with local.serve(store, environment=kept) as service, closing(Connection(service)) as connection:
        assert connection.step(id_, observations[1], 2)[1:2] == (expected[1],)
        assert connection.step(id_, observations[2], 3)[:2] == (200, expected[2])
    assert [file.name for file in tmp_path.iterdir()] == ["sessions.sqlite"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_temporary_file_goes_with_the_service(store: Path, tmp_path: Path, workers: str) -> None:
    with (
        local.serve(store, "--workers", workers, environment={**os.environ, "TMPDIR": str(tmp_path)}) as service,
    ):
        if workers == "2":
            _wait_for_both(service)
        with closing(Connection(service)) as connection:
            connection.begin()
        assert len(list(tmp_path.glob("actserve-*/sessions.sqlite"))) == 1
    assert list(tmp_path.glob("actserve-*")) == []


def test_killed_clients_leave_nothing_behind(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite"
    with (
        local.serve(store, environment=environment(sessions=path, session_idle_s=1)) as service,
        closing(Connection(service)) as connection,
    ):
        begun = [connection.begin(X_Owner="me") for _ in range(20)]
        time.sleep(2.2)
        status, answer, _ = connection.step(begun[0], np.zeros(4), 1)
        assert (status, answer["error"]["code"]) == (410, "session_expired")
        with closing(sqlite3.connect(path)) as file:
            until(lambda: file.execute("SELECT count(*) FROM session").fetchone() == (0,))


def test_a_session_whose_version_was_taken_away_is_told(store: Path, tmp_path: Path) -> None:
    own = tmp_path / "store"
    shutil.copytree(store, own)
    kept = environment(sessions=tmp_path / "sessions.sqlite")
    with local.serve(own, environment=kept) as service, closing(Connection(service)) as connection:
        id_ = connection.begin()
    shutil.rmtree(own / "gru" / "2")
    with local.serve(own, environment=kept) as service, closing(Connection(service)) as connection:
        status, answer, _ = connection.step(id_, np.zeros(4), 1)
        assert (status, answer["error"]["code"]) == (410, "session_expired")
        assert "gru has no version '2'" in answer["error"]["message"]


def test_a_sessions_file_that_cannot_be_used_is_one_line(store: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database\n" * 100)
    with (
        pytest.raises(ServiceUnreachable, match="error: the sessions file cannot be used: file is not a"),
        local.serve(store, environment=environment(sessions=tmp_path / "notes.txt")),
    ):
        pass
