"""The stream's routes, on a real uvicorn: `tests.stream_service`."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import urllib3

from actserve.client.stream import Stream
from actserve.core.completion import MAX_SEED
from actserve.core.errors import NotServing, Overloaded, ServiceError
from actserve.core.settings import Settings
from actserve.core.signature import Exploration
from actserve.telemetry.counts import STREAM
from tests.fake_policy import NAME, Alone, Versions, same, seen
from tests.stream_service import Service, application, running
from tests.streams import UPGRADE, alone, answer, ask, closing, opened, raw
from tests.waiting import until


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as up:
        yield up


def test_the_hello_says_what_a_client_needs(service: Service) -> None:
    with opened(service, "?outputs=value&exploration=random&seed=5") as ws:
        hello = json.loads(ws.recv())
    assert hello["signature"].pop("observations") == [
        {"name": "x", "dtype": "int64", "shape": [], "low": 0.0, "high": 999.0}
    ]
    assert [spec["name"] for spec in hello["signature"].pop("outputs")] == ["action", "value"]
    assert hello == {
        "policy": NAME,
        "version": 1,
        "runtime": "onnx",
        "signature": {
            "max_batch": 1,
            "state": [],
            "is_init": True,
            "exploration": ["deterministic", "random"],
            "parameters": [],
            "noise": [],
            "chunk": None,
            "limits": None,
        },
        "offsets": {"action": 16, "value": 24},
        "environment": None,
        "exploration": "random",
        "seed": 5,
        "window": 8,
        "max_message_bytes": (64 << 10) + 2 * 32,
        "idle_s": 600.0,
        "recorded": False,
    }


def test_a_seed_is_told_only_where_something_is_random(service: Service) -> None:
    with opened(service) as ws:
        assert json.loads(ws.recv())["seed"] is None
    with opened(service, "?exploration=random") as one, opened(service, "?exploration=random") as other:
        seeds = [json.loads(ws.recv())["seed"] for ws in (one, other)]
    assert len({*seeds}) == 2
    assert all(type(seed) is int and 0 <= seed <= MAX_SEED for seed in seeds)


@pytest.mark.parametrize("exploration", ["deterministic", "random"])
def test_steps_are_those_of_the_policy_alone_with_its_state_in_a_variable(
    service: Service, exploration: Exploration
) -> None:
    model = alone(exploration, seed=3)
    rng = random.Random(0)
    with Stream(service.url, outputs=["value"], exploration=exploration, seed=3) as stream:
        for number in range(1, 50):
            x, reset = rng.randrange(1000), number > 1 and rng.random() < 0.1
            step = seen(x, is_init=True) if reset else seen(x)
            action = stream.act({name: array[0] for name, array in step.items()})
            expected = model.take(step)
            assert type(action) is int
            assert action == expected["action"][0]
            assert same({name: array[None] for name, array in stream.outputs.items()}, expected)
            assert stream.steps == number


def test_text_and_binary_messages_are_steps_of_one_episode(service: Service) -> None:
    model = alone()
    with opened(service, "?outputs=value") as ws:
        ws.recv()
        ws.send(raw(5))
        message = ws.recv(decode=False)
        expected = model.take(seen(5))
        assert message[16:24] == expected["action"].tobytes()
        assert message[24:] == expected["value"].tobytes()
        reply = ask(ws, '{"x": 6}')
        expected = model.take(seen(6))
        assert (reply["step"], reply["action"]) == (2, expected["action"][0])
        assert np.float32(reply["value"]).tolist() == expected["value"][0].tolist()
        assert reply.keys() == {"action", "value", "step", "queue_us", "run_us"}
        again = ask(ws, '{"x": {"dtype": "int64", "shape": [], "b64": "BwAAAAAAAAA="}, "is_init": true}')
        assert (again["step"], again["action"]) == (3, model.take(seen(7, is_init=True))["action"][0])


def test_binary_messages_can_be_another_encoding(service: Service) -> None:
    import safetensors.numpy

    with opened(service, "?binary=application/safetensors") as ws:
        ws.recv()
        message = safetensors.numpy.save({"x": np.array(5), "is_init": np.array(True)})
        assert ask(ws, message) == (1, alone().take(seen(5))["action"][0])


def test_replies_come_in_order_however_far_ahead_the_client_is(service: Service) -> None:
    model = alone()
    with Stream(service.url) as stream:
        for x in range(100):
            if stream.unanswered == stream.hello.window:
                receive(stream, model)
            stream.send(np.array(x))
        while stream.unanswered:
            receive(stream, model)
    assert model.step == 100


def receive(stream: Stream, model: Alone) -> None:
    reply = stream.receive()
    assert reply.outputs["action"] == model.take(seen(model.step))["action"][0]
    assert reply.step == model.step


def test_two_streams_never_mix(service: Service) -> None:
    rng = random.Random(1)
    models = [alone("random", seed) for seed in (1, 2, 2)]
    with (
        Stream(service.url, exploration="random", seed=1) as one,
        Stream(service.url, exploration="random", seed=2) as two,
        Stream(service.url, NAME, 1, exploration="random", seed=2) as three,
    ):
        for _ in range(150):
            which = rng.randrange(3)
            x = rng.randrange(1000)
            assert (one, two, three)[which].act(np.array(x)) == models[which].take(seen(x))["action"][0]


BAD: dict[str, tuple[bytes | str, int, str]] = {
    "a byte too few": (b"1234567", 422, "invalid_tensor"),
    "two items": (bytes(16), 422, "invalid_request"),
    "nothing": (b"", 422, "invalid_tensor"),
    "out of bounds": (raw(1000), 422, "invalid_tensor"),
    "no text": ("", 400, "malformed_body"),
    "not JSON": ("{", 400, "malformed_body"),
    "a list": ("[1]", 400, "malformed_body"),
    "NaN": ('{"x": NaN}', 400, "malformed_body"),
    "a fraction": ('{"x": 1.5}', 422, "invalid_tensor"),
    "no observation": ('{"is_init": true}', 422, "invalid_tensor"),
    "state": ('{"x": 1, "digest": [1, 2]}', 422, "invalid_tensor"),
    "a batch": ('{"x": [1]}', 422, "invalid_request"),
    "a seed": ('{"x": 1, "seed": 1}', 422, "invalid_request"),
}


@pytest.mark.parametrize(("message", "status", "code"), BAD.values(), ids=BAD)
def test_a_bad_message_is_told_and_moves_nothing(
    service: Service, message: bytes | str, status: int, code: str
) -> None:
    model = alone()
    with opened(service) as ws:
        ws.recv()
        for sent in (message, raw(1), message, raw(2), raw(3)):  # ahead of the replies
            ws.send(sent)
        for step in (1, 2):
            told = answer(ws)
            assert (told["status"], told["error"]["code"], told["step"]) == (status, code, step)
            assert told["error"].keys() == {"code", "message", "detail"}
            assert answer(ws) == (step, model.take(seen(step))["action"][0])
        assert answer(ws) == (3, model.take(seen(3))["action"][0])


def test_what_the_policy_refuses_moves_nothing_either(service: Service) -> None:
    runtime = service.registry.runtimes[1]
    with Stream(service.url) as stream:
        first = stream.act(np.array(1))
        runtime.failing = True
        try:
            with pytest.raises(ServiceError, match="500 runtime_failure"):
                stream.act(np.array(2))
        finally:
            runtime.failing = False
        model = alone()
        assert [first, stream.act(np.array(3))] == [model.take(seen(x))["action"][0] for x in (1, 3)]
        assert stream.steps == 2


@pytest.mark.parametrize(
    ("error", "told", "closed"),
    [
        (Overloaded(3), "overloaded", None),
        (NotServing("closing"), "not_serving", (1012, "closing")),
    ],
)
def test_only_what_lasts_ends_the_stream(
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    told: str,
    closed: tuple[int, str] | None,
) -> None:
    def fail(*_: object) -> None:
        raise error

    with opened(service) as ws:
        ws.recv()
        with monkeypatch.context() as patched:
            patched.setattr(service.registry.policies[1].batcher, "enter", fail)
            ws.send(raw(1))
            assert answer(ws)["error"]["code"] == told
            if closed:
                assert closing(ws) == closed
        if not closed:
            assert ask(ws, raw(1)) == (1, alone().take(seen(1))["action"][0])


def test_a_fault_of_the_service_ends_the_stream_and_says_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ValueError("a secret")

    with opened(service) as ws:
        ws.recv()
        monkeypatch.setattr(service.registry.policies[1], "act", fail)
        ws.send('{"x": 1}')
        assert closing(ws) == (1011, "the service failed on this message; its log says why")


REFUSED = {
    "policy": ("/policies/chess/stream", 404, "unknown_policy"),
    "version": (f"/policies/{NAME}/versions/9/stream", 404, "unknown_version"),
    "output": ("/stream?outputs=logits", 422, "unknown_output"),
    "exploration": ("/stream?exploration=wild", 400, "malformed_body"),
    "seed": ("/stream?seed=-1", 400, "malformed_body"),
    "binary": ("/stream?binary=image/jpeg", 415, "unsupported_content_type"),
}


@pytest.mark.parametrize(("path", "status", "code"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_begin_is_refused_over_http(service: Service, path: str, status: int, code: str) -> None:
    response = urllib3.request("GET", service.url + path, headers=UPGRADE)
    assert (response.status, response.json()["error"]["code"]) == (status, code)


def test_who_does_not_upgrade_is_told_to(service: Service) -> None:
    response = urllib3.request("GET", f"{service.url}/policies/{NAME}/stream")
    assert (response.status, response.headers["Upgrade"]) == (426, "websocket")
    assert "WebSocket" in response.json()["error"]["message"]
    paths = urllib3.request("GET", f"{service.url}/openapi.json").json()["paths"]
    assert "binary message" in paths["/policies/{name}/stream"]["get"]["description"]


@pytest.mark.parametrize(("query", "code"), [("outputs=logits", 1008), ("", 1013)])
def test_a_server_that_cannot_answer_over_http_closes_with_the_reason(query: str, code: int) -> None:
    class Loading(Versions):
        async def get(self, name: str | None = None, version: int | None = None) -> Any:
            if not query:
                raise NotServing("policies are still being loaded; " + 50 * "é")
            return await super().get(name, version)

    async def scenario() -> list[Any]:
        app = application(Settings(), Loading())
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/stream", "query_string": query.encode(), "headers": []}
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)
        return sent

    accepted, closed = asyncio.run(scenario())
    assert accepted["type"] == "websocket.accept"
    assert (closed["type"], closed["code"]) == ("websocket.close", code)
    assert 0 < len(closed["reason"].encode()) <= 123


@pytest.mark.parametrize("query", ["", "?exploration=random&seed=1"])
def test_a_stream_counts_its_messages(query: str) -> None:
    """Whether the lane steps it or the route."""
    with running() as service:
        counts = service.registry.counts
        tally = counts.tally(NAME, "websocket", STREAM)
        with opened(service, query) as ws:
            ws.recv()
            until(lambda: counts.streams == 1)
            for x in range(3):
                ask(ws, raw(x))
            ask(ws, '{"x": 1}')
            ask(ws, '{"y": 1}')
            ask(ws, b"short")
        until(lambda: counts.streams == 0)
        assert (tally.answered, dict(tally.codes), dict(tally.reasons)) == (4, {"422": 2}, {"invalid_tensor": 2})
        assert counts.meters(service.registry.policies[1].program).sizes.total == 4
