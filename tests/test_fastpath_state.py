"""Steps of sessions, and state that clients carry, on the fast path: as the routes answer them, and none is lost."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import urllib3
from fastapi import FastAPI
from safetensors.numpy import load, save

from actserve import wire
from actserve.server.fastpath.session_step import SessionStep
from actserve.server.protocols.oip.fast_infer import INFER
from actserve.server.sessions import SessionLimits, Sessions
from actserve.telemetry.counts import ACT
from actserve.wire.oip import HEADER
from tests import stream_service
from tests.fake_policy import NAME, Alone, seen
from tests.oip import in_binary
from tests.stream_service import Service
from tests.waiting import until

PATH = f"/policies/{NAME}/act"
ENCODINGS: dict[str, Callable[[int], bytes]] = {
    wire.RAW: lambda x: np.int64(x).tobytes(),
    wire.JSON: lambda x: b'{"x": %d}' % x,
    wire.SAFETENSORS: lambda x: save({"x": np.array(x, np.int64)}),
}


@pytest.fixture(scope="module")
def fast() -> Iterator[Service]:
    with stream_service.running() as up:
        yield up


@pytest.fixture(scope="module")
def plain() -> Iterator[Service]:
    with stream_service.running(http="httptools") as up:
        yield up


def taken(service: Service) -> int:
    """The answers of the fast path."""
    return service.registry.counts.tally(NAME, "fastpath", ACT).answered


def begin(service: Service, **options: object) -> str:
    answer = urllib3.request("POST", f"{service.url}/policies/{NAME}/sessions", json=options)
    assert answer.status == 201
    session: str = answer.json()["session"]
    return session


def post(service: Service, body: bytes, content_type: str, path: str = PATH, **headers: str) -> tuple[int, str, bytes]:
    """Status, the headers that matter, and the body."""
    named = {"Content-Type": content_type} | {name.replace("_", "-"): value for name, value in headers.items()}
    answer = urllib3.request("POST", service.url + path, body=body, headers=named)
    told = [
        f"{name}: {answer.headers[name]}" for name in ("x-step", "x-replayed", "content-type") if name in answer.headers
    ]
    return answer.status, ", ".join(told), answer.data


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_session_is_answered_as_the_routes_do(fast: Service, plain: Service, encoding: str) -> None:
    encode = ENCODINGS[encoding]
    before = taken(fast)
    sessions = [(service, begin(service)) for service in (fast, plain)]
    steps = [("", 5), ("2", 6), ("3", 7), ("3", 7), ("3", 999), ("9", 1), ("4", 8), ("", 9), ("nonsense", 1), ("6", 10)]
    for step, x in steps:
        headers = {"X_Step": step} if step else {}
        one, other = (post(service, encode(x), encoding, X_Session=id_, **headers) for service, id_ in sessions)
        assert one == other, (step, x)
    assert taken(fast) == before + 6, "the others are retries and conflicts"
    with_value = [
        post(service, encode(1), encoding, f"{PATH}?outputs=action,value", X_Session=id_) for service, id_ in sessions
    ]
    assert with_value[0] == with_value[1]
    assert taken(fast) == before + 7


def test_a_step_can_begin_an_episode(fast: Service) -> None:
    id_, expected = begin(fast), Alone(1, 0, None)
    before = taken(fast)
    for x, is_init in ((3, None), (4, False), (5, True), (6, None)):
        document = {"x": x} if is_init is None else {"x": x, "is_init": is_init}
        status, _, body = post(fast, json.dumps(document).encode(), wire.JSON, X_Session=id_)
        assert status == 200
        assert json.loads(body)["action"] == int(expected.take(seen(x, is_init))["action"][0])
    assert taken(fast) == before + 4


@pytest.mark.parametrize("accept", [wire.JSON, wire.SAFETENSORS])
@pytest.mark.parametrize("encoding", [wire.JSON, wire.SAFETENSORS])
def test_a_client_carries_the_state(fast: Service, plain: Service, encoding: str, accept: str) -> None:
    before, expected = taken(fast), Alone(1, 0, None)
    carried: dict[str, np.ndarray] = {}
    for x in (3, 1, 4, 1, 5, 9, 2, 6):
        tensors = {"x": np.array(x, np.int64), **carried}
        lists = {name: array.tolist() for name, array in tensors.items()}
        body = save(tensors) if encoding == wire.SAFETENSORS else json.dumps(lists).encode()
        answers = [post(service, body, encoding, Accept=accept) for service in (fast, plain)]
        assert answers[0] == answers[1]
        content = answers[0][2]
        found = (
            load(content) if accept == wire.SAFETENSORS else {n: np.array(v) for n, v in json.loads(content).items()}
        )
        assert found["action"] == expected.take(seen(x))["action"][0]
        carried = {name: found[name] for name in ("digest", "odd")}
    assert taken(fast) == before + 8


@pytest.mark.parametrize(
    "document",
    [
        {"x": 1, "digest": [1, 2]}, {"x": 1, "digest": [1, 2], "odd": 3}, {"x": [1, 2]}, {"x": 1000},
        {"x": 1, "seed": 3}, {"x": 1, "exploration": "random", "seed": 3}, {"x": 1, "is_init": [True]},
        {"x": [1, 2], "digest": [[1, 2], [3, 4]], "odd": [True, False]},
    ],
)  # fmt: skip
def test_everything_else_is_answered_alike(fast: Service, plain: Service, document: object) -> None:
    body = json.dumps(document).encode()
    assert post(fast, body, wire.JSON) == post(plain, body, wire.JSON)
    with_session = [post(service, body, wire.JSON, X_Session=begin(service)) for service in (fast, plain)]
    assert with_session[0] == with_session[1]


def test_a_session_with_a_choice_of_its_own_is_answered_by_the_routes(fast: Service) -> None:
    id_, expected = begin(fast, exploration="random", seed=5), Alone(1, 5, "random")
    for x in (1, 2, 3):
        status, _, body = post(fast, ENCODINGS[wire.RAW](x), wire.RAW, X_Session=id_)
        assert (status, json.loads(body)["action"]) == (200, int(expected.take(seen(x))["action"][0]))


def test_it_waits_for_another_process_that_writes(fast: Service) -> None:
    id_, expected = begin(fast), Alone(1, 0, None)
    app = fast.server.config.app
    assert isinstance(app, FastAPI)
    sessions: Sessions = app.state.sessions
    with closing(sqlite3.connect(sessions._file.path, isolation_level=None)) as other, ThreadPoolExecutor(1) as aside:
        other.execute("BEGIN IMMEDIATE")
        step = aside.submit(post, fast, ENCODINGS[wire.RAW](3), wire.RAW, X_Session=id_, X_Step="1")
        time.sleep(0.3)
        assert not step.done()
        assert post(fast, ENCODINGS[wire.RAW](4), wire.RAW)[0] == 200, "requests without a session go on"
        other.execute("COMMIT")
        status, told, body = step.result()
    assert (status, told) == (200, f"x-step: 1, content-type: {wire.JSON}")
    assert json.loads(body)["action"] == int(expected.take(seen(3))["action"][0])
    _, _, body = post(fast, ENCODINGS[wire.RAW](4), wire.RAW, X_Session=id_, X_Step="2")
    assert json.loads(body)["action"] == int(expected.take(seen(4))["action"][0])


def test_one_step_that_several_requests_take_is_taken_once() -> None:
    with stream_service.running(slow=True) as service, ThreadPoolExecutor(4) as clients:
        id_, expected = begin(service), Alone(1, 0, None)
        gate = service.hold()
        numbered = [clients.submit(post, service, b'{"x": 3}', wire.JSON, X_Session=id_, X_Step="1") for _ in range(4)]
        batcher = service.registry.policies[1].batcher
        until(lambda: batcher.statistics().waiting == 4)
        gate.set()
        answers = [client.result() for client in numbered]
        action = int(expected.take(seen(3))["action"][0])
        assert {(status, json.loads(body)["action"]) for status, _, body in answers} == {(200, action)}
        assert sorted("x-replayed: 1" in told for _, told, _ in answers) == [False, True, True, True]
        gate.clear()
        free = [clients.submit(post, service, b'{"x": 4}', wire.JSON, X_Session=id_) for _ in range(4)]
        until(lambda: batcher.statistics().waiting == 4)
        gate.set()
        told = {client.result()[1].split(",")[0]: json.loads(client.result()[2])["action"] for client in free}
        assert told == {f"x-step: {n}": int(expected.take(seen(4))["action"][0]) for n in (2, 3, 4, 5)}


def test_a_step_that_cannot_be_answered_is_stored_and_the_others_of_its_batch_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stream_service.running(slow=True) as service, ThreadPoolExecutor(4) as clients:
        ids = [begin(service) for _ in range(4)]
        unlucky = ids[1]
        first = post(service, b'{"x": 3}', wire.JSON, X_Session=unlucky)
        assert first[0] == 200
        fields = SessionStep.fields

        def fail_once(step: SessionStep, *taken: Any) -> bytes:
            if step._number == 2:
                monkeypatch.undo()
                raise ZeroDivisionError
            return fields(step, *taken)

        monkeypatch.setattr(SessionStep, "fields", fail_once)
        gate = service.hold()
        headers = {"Content-Type": wire.JSON}
        answers = [
            clients.submit(
                urllib3.request, "POST", service.url + PATH, body=b'{"x": 4}', headers=headers | {"X-Session": id_},
                retries=False,
            )
            for id_ in ids
        ]  # fmt: skip
        batcher = service.registry.policies[1].batcher
        until(lambda: batcher.statistics().waiting == 4)
        gate.set()
        assert [answers[i].result().status for i in (0, 2, 3)] == [200] * 3
        with pytest.raises(urllib3.exceptions.ProtocolError):
            answers[1].result()
        status, told, body = post(service, b'{"x": 999}', wire.JSON, X_Session=unlucky, X_Step="2")
        expected = Alone(1, 0, None)
        expected.take(seen(3))
        assert (status, told.split(", ")[:2]) == (200, ["x-step: 2", "x-replayed: 1"])
        assert json.loads(body)["action"] == int(expected.take(seen(4))["action"][0])


def test_a_session_stays_on_its_version() -> None:
    with stream_service.running() as service:
        id_, expected = begin(service), Alone(1, 0, None)
        for number in (1, 2, 3, 4):
            status, _, body = post(service, ENCODINGS[wire.RAW](number), wire.RAW, X_Session=id_, X_Step=str(number))
            assert (status, json.loads(body)["action"]) == (200, int(expected.take(seen(number))["action"][0]))
            if number == 2:
                loop = service.server.servers[0].get_loop()
                published: Future[int] = Future()
                loop.call_soon_threadsafe(lambda: published.set_result(service.registry.publish()))  # noqa: B023
                assert published.result(60) == 2


def test_state_of_requests_in_progress_is_freed(fast: Service) -> None:
    arena = fast.registry.policies[1].batcher.arena
    assert arena is not None
    with ThreadPoolExecutor(8) as clients:
        for answer in clients.map(lambda x: post(fast, b'{"x": %d}' % x, wire.JSON), range(64)):
            assert answer[0] == 200
    slots = len(next(iter(arena._kept.values())))
    until(lambda: len(arena._slots) == slots)
    assert arena.free == arena._rows


OIP = f"/v2/models/{NAME}/infer"


def infer(service: Service, body: bytes, path: str = OIP, **headers: str) -> tuple[int, str, str, bytes]:
    """Status, the headers of the protocol, and the body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = urllib3.request("POST", service.url + path, body=body, headers=named, decode_content=False)
    told = answer.headers
    return answer.status, told.get(HEADER, ""), told.get("content-encoding", ""), answer.data


def infer_taken(service: Service) -> int:
    return service.registry.counts.tally(NAME, "fastpath", INFER).answered


def test_infer_requests_are_answered_as_the_routes_do(fast: Service, plain: Service) -> None:
    before, expected = infer_taken(fast), Alone(1, 0, None)
    carried: dict[str, np.ndarray] = {}
    for x in (3, 1, 4, 1, 5):
        tensors = {"x": np.array([x], np.int64), **carried}
        body, headers = in_binary(tensors, outputs=[{"name": name} for name in ("action", "digest", "odd")])
        answers = [infer(service, body, **headers) for service in (fast, plain)]
        assert answers[0] == answers[1]
        outputs = {each["name"]: np.array(each["data"]) for each in json.loads(answers[0][3])["outputs"]}
        assert outputs["action"] == expected.take(seen(x))["action"]
        carried = {"digest": outputs["digest"].reshape(1, 2).astype(np.int64), "odd": outputs["odd"].astype(bool)}
    assert infer_taken(fast) == before + 5


X_IN_JSON: dict[str, Any] = {"name": "x", "datatype": "INT64", "shape": [1], "data": [3]}
VALUE_IN_BINARY = {"name": "value", "parameters": {"binary_data": True}}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "in JSON": {"inputs": [X_IN_JSON]},
    "with an id": {"id": "a", "inputs": [X_IN_JSON]},
    "outputs in binary": {"inputs": [X_IN_JSON], "parameters": {"binary_data_output": True}},
    "one output in binary": {
        "inputs": [X_IN_JSON],
        "outputs": [VALUE_IN_BINARY, {"name": "action"}],
    },
    "with a seed": {"inputs": [X_IN_JSON], "parameters": {"seed": 3, "exploration": "random"}},
    "with a deadline": {"inputs": [X_IN_JSON], "parameters": {"timeout": 60_000_000}},
    "an unknown output": {"inputs": [X_IN_JSON], "outputs": [{"name": "reward"}]},
    "two items": {"inputs": [{**X_IN_JSON, "shape": [2], "data": [3, 4]}]},
    "out of bounds": {"inputs": [{**X_IN_JSON, "data": [1000]}]},
    "a sequence": {"inputs": [X_IN_JSON], "parameters": {"sequence_id": 5, "sequence_start": True}},
    "an unknown sequence": {"inputs": [X_IN_JSON], "parameters": {"sequence_id": 99}},
    "no input": {"inputs": []},
}
FAST = {"in JSON", "with an id", "outputs in binary", "one output in binary"}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_an_infer_request_of_every_kind_is_answered_as_the_routes_do(fast: Service, plain: Service, kind: str) -> None:
    body, before = json.dumps(DOCUMENTS[kind]).encode(), infer_taken(fast)
    assert infer(fast, body) == infer(plain, body)
    on_version = OIP.replace("/infer", "/versions/1/infer")
    assert infer(fast, body, on_version, Accept_Encoding="gzip") == infer(
        plain, body, on_version, Accept_Encoding="gzip"
    )
    assert (infer_taken(fast) == before + 1) is (kind in FAST)


def in_sequence(x: int, id_: int | str, is_init: bool | None = None, **parameters: object) -> bytes:
    inputs = [{**X_IN_JSON, "data": [x]}]
    if is_init is not None:
        inputs.append({"name": "is_init", "datatype": "BOOL", "shape": [1], "data": [is_init]})
    return json.dumps({"inputs": inputs, "parameters": {"sequence_id": id_, **parameters}}).encode()


def action_of(body: bytes) -> int:
    outputs = {each["name"]: each["data"] for each in json.loads(body)["outputs"]}
    return int(outputs["action"][0])


@pytest.mark.parametrize("id_", [7, "seven"])
def test_a_sequence_is_answered_as_the_routes_do(fast: Service, plain: Service, id_: int | str) -> None:
    before, expected = infer_taken(fast), Alone(1, 0, None)
    steps: list[tuple[int, dict[str, Any]]] = [
        (3, {"sequence_start": True}), (4, {}), (5, {"is_init": False}), (6, {"is_init": True}), (7, {}),
        (8, {"binary_data_output": False, "priority": 3}), (9, {"sequence_end": True}),
    ]  # fmt: skip
    for x, options in steps:
        answers = [infer(service, in_sequence(x, id_, **options)) for service in (fast, plain)]
        assert answers[0] == answers[1]
        assert action_of(answers[0][3]) == int(expected.take(seen(x, options.get("is_init")))["action"][0])
    assert infer_taken(fast) == before + len(steps) - 2, "the routes take the first and the last one"
    for refused in (in_sequence(1, id_), in_sequence(1, "", sequence_start=True)):
        assert infer(fast, refused) == infer(plain, refused)
        assert infer(fast, refused)[0] in (400, 404)


def test_what_a_sequence_cannot_have_is_refused_as_the_routes_do(fast: Service, plain: Service) -> None:
    before = infer_taken(fast)
    for service in (fast, plain):
        assert infer(service, in_sequence(3, 8, sequence_start=True, seed=5))[0] == 200
    state = {"name": "digest", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}
    documents: list[dict[str, Any]] = [
        {"inputs": [X_IN_JSON, state], "parameters": {"sequence_id": 8}},
        {"inputs": [{**X_IN_JSON, "shape": [2], "data": [3, 4]}], "parameters": {"sequence_id": 8}},
        {"inputs": [X_IN_JSON], "outputs": [{"name": "digest"}], "parameters": {"sequence_id": 8}},
        {"inputs": [X_IN_JSON], "parameters": {"sequence_id": 8, "seed": 6}},
    ]
    for document in documents:
        body = json.dumps(document).encode()
        assert infer(fast, body) == infer(plain, body)
        assert infer(fast, body)[0] == 400
    assert infer_taken(fast) == before
    body = in_sequence(4, 8)
    assert infer(fast, body) == infer(plain, body)
    assert infer_taken(fast) == before + 1, "nothing has moved"


def test_every_step_of_a_sequence_is_taken_once_whoever_takes_it() -> None:
    with stream_service.running(slow=True) as service, ThreadPoolExecutor(4) as clients:
        expected = Alone(1, 0, None)
        assert infer(service, in_sequence(3, 5, sequence_start=True))[0] == 200
        expected.take(seen(3))
        gate = service.hold()
        steps = [clients.submit(infer, service, in_sequence(4, 5)) for _ in range(4)]
        batcher = service.registry.policies[1].batcher
        until(lambda: batcher.statistics().waiting == 4)
        gate.set()
        answers = [step.result() for step in steps]
        assert {status for status, *_ in answers} == {200}
        actions = sorted(action_of(body) for *_, body in answers)
        assert actions == sorted(int(expected.take(seen(4))["action"][0]) for _ in range(4))


def test_a_sequence_that_another_process_began_again_goes_on_there(fast: Service) -> None:
    assert infer(fast, in_sequence(3, 6, sequence_start=True))[0] == 200
    assert infer(fast, in_sequence(4, 6))[0] == 200
    app = fast.server.config.app
    assert isinstance(app, FastAPI)
    with Sessions(app.state.sessions._file.path, SessionLimits()) as elsewhere:
        elsewhere.begin(NAME, 1, sequence=6)
    before, expected = infer_taken(fast), Alone(1, 0, None)
    for x in (5, 6):
        assert action_of(infer(fast, in_sequence(x, 6))[3]) == int(expected.take(seen(x))["action"][0])
    assert infer_taken(fast) == before + 2
    found = urllib3.request("GET", f"{fast.url}/v2/models/{NAME}/stats").json()["model_stats"][0]["inference_stats"]
    assert all(found[part]["ns"] >= 0 for part in ("queue", "compute_input", "compute_infer", "compute_output"))
    app.state.sessions.end(app.state.sessions.sequence(NAME, 6))
    status, *_, body = infer(fast, in_sequence(7, 6))
    assert (status, json.loads(body)["error"]) == (404, f"no sequence '6' of {NAME}: never begun, ended or timed out")


def test_the_statistics_of_infer_requests_count_those_of_the_fast_path(fast: Service) -> None:
    def count() -> dict[str, int]:
        answer = urllib3.request("GET", f"{fast.url}/v2/models/{NAME}/stats").json()
        found = answer["model_stats"][0]["inference_stats"]
        assert found["success"]["ns"] == sum(
            found[part]["ns"] for part in ("queue", "compute_input", "compute_infer", "compute_output")
        )
        return {name: found[name]["count"] for name in ("success", "fail")}

    before = count()
    assert infer(fast, json.dumps(DOCUMENTS["in JSON"]).encode())[0] == 200
    fast.registry.runtimes[1].failing = True
    assert infer(fast, json.dumps(DOCUMENTS["in JSON"]).encode())[0] == 500
    fast.registry.runtimes[1].failing = False
    assert count() == {name: number + 1 for name, number in before.items()}
