"""Episodes on WebSockets, on the fast path and on the route: streams, and the robots' wires in msgpack."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from actserve.core.settings import Settings
from actserve.server.access.tokens import Token, add_token
from actserve.server.episode_state import EpisodeState
from actserve.server.protocols.robots.packed import of_openpi, of_vla_eval, pack, unpack
from tests.benchmarks.robot_load import frame
from tests.fake_policy import seen
from tests.stream_service import Service, running
from tests.streams import REPLY, alone, closing, raw
from tests.test_stream_connections import kill
from tests.waiting import until


@dataclass(frozen=True)
class Wire:
    path: str
    greets: bool
    message: Callable[[int], bytes]  # with the observation x
    action: Callable[[bytes], Any]  # of a reply
    is_error: Callable[[Any], bool]


def openpi(x: int) -> bytes:
    return pack({"observation/x": np.array(x)}, of_openpi)


def openpi_with_text(x: int) -> bytes:
    """The prompt changes now and then, and a camera is ignored."""
    camera = np.full((4, 4), x % 7, np.uint8)
    return pack({"prompt": "more" * (x % 5), "camera": camera, "x": np.array([x], np.int32)}, of_openpi)


def openpi_with_flag(x: int) -> bytes:
    return pack({"x": np.array(x), "is_init": False}, of_openpi)


def roboarena(x: int) -> bytes:
    return pack({"endpoint": "infer", "x": x}, of_openpi)


def vla_eval(x: int) -> bytes:
    return pack({"type": "observation", "seq": x, "payload": {"x": np.array(x, np.uint16)}}, of_vla_eval)


def is_text(reply: Any) -> bool:
    return isinstance(reply, str)


WIRES = {
    "stream": Wire("/stream", True, raw, lambda reply: REPLY.unpack(reply)[3], is_text),
    "openpi": Wire("/", True, openpi, lambda reply: unpack(reply)["action"], is_text),
    "openpi, text": Wire("/", True, openpi_with_text, lambda reply: unpack(reply)["actions"][0, 0], is_text),
    "openpi, flag": Wire("/", True, openpi_with_flag, lambda reply: unpack(reply)["action"], is_text),
    "RoboArena": Wire("/", True, roboarena, lambda reply: unpack(reply)[0, 0], is_text),
    "vla-eval": Wire(
        *("/vla-eval", False, vla_eval, lambda reply: unpack(reply)["payload"]["actions"]),
        lambda reply: unpack(reply)["type"] == "error",
    ),
}
SETTINGS = Settings(ignore="prompt,camera")


class Client:
    def __init__(self, wire: Wire, ws: ClientConnection) -> None:
        self._wire, self.ws = wire, ws
        if wire.greets:
            ws.recv(60)

    def send(self, x: int) -> None:
        self.ws.send(self._wire.message(x))

    def receive(self) -> Any:
        """The action, or the reply of an error."""
        reply = self.ws.recv(60)
        return reply if self._wire.is_error(reply) else self._wire.action(reply)  # type: ignore[arg-type]

    def act(self, x: int) -> Any:
        self.send(x)
        return self.receive()

    def is_refused(self, message: Any) -> bool:
        self.ws.send(message)
        return self._wire.is_error(self.ws.recv(60))


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> Wire:
    return WIRES[request.param]


class opened:  # noqa: N801
    """A context manager: a client of the service."""

    def __init__(self, service: Service, wire: Wire, **options: Any) -> None:
        url = service.url.replace("http", "ws") + wire.path
        self._wire, self._connection = wire, connect(url, compression=None, proxy=None, **options)

    def __enter__(self) -> Client:
        return Client(self._wire, self._connection.__enter__())

    def __exit__(self, *error: Any) -> None:
        self._connection.__exit__(*error)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(SETTINGS) as up:
        yield up


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each step that the route has taken."""
    found: list[Any] = []
    act = EpisodeState.act

    async def act_and_count(self: EpisodeState, tensors: Any, patience_ns: int = 0) -> Any:
        found.append(tensors)
        return await act(self, tensors, patience_ns)

    monkeypatch.setattr(EpisodeState, "act", act_and_count)
    return found


def expected(model: Any, x: int) -> Any:
    return model.take(seen(x))["action"][0]


def test_the_fast_path_takes_all_steps(service: Service, wire: Wire, routed: list[Any]) -> None:
    rng, model = random.Random(0), alone()
    with opened(service, wire) as client:
        for _ in range(60):
            x = rng.randrange(1000)
            assert client.act(x) == expected(model, x)
    assert not routed


def test_many_values_that_are_ignored_cost_no_step(service: Service, routed: list[Any]) -> None:
    model, deep = alone(), 500
    with opened(service, WIRES["openpi"]) as client:
        for x in range(3):
            nested: Any = x
            for _ in range(deep):
                nested = [nested]
            client.ws.send(pack({"x": np.array(x), "prompt": nested, "camera": [x] * 4000}, of_openpi))
            assert client.receive() == expected(model, x)
    assert not routed


def test_the_fast_path_draws_noise_from_the_seed(service: Service, wire: Wire, routed: list[Any]) -> None:
    drawing = replace(wire, path=f"{wire.path}?exploration=random&seed=3")
    model, other_model = alone("random", 3), alone()
    with opened(service, drawing) as client, opened(service, wire) as other:
        for x in range(20):
            assert client.act(x) == expected(model, x)
            assert other.act(x) == expected(other_model, x)
    assert not routed


def test_episodes_of_one_batch_never_mix(wire: Wire, routed: list[Any]) -> None:
    with running(SETTINGS, slow=True) as service, ExitStack() as stack:
        kinds = (wire, wire, WIRES["stream"], WIRES["openpi"])
        clients = [stack.enter_context(opened(service, kind)) for kind in kinds]
        clients.append(
            stack.enter_context(opened(service, replace(wire, path=f"{wire.path}?exploration=random&seed=4")))
        )
        models = [*(alone() for _ in kinds), alone("random", 4)]
        for step in range(10):
            for number, client in enumerate(clients):
                client.send(10 * step + number)
            for number, (client, model) in enumerate(zip(clients, models, strict=True)):
                assert client.receive() == expected(model, 10 * step + number)
    assert not routed


def test_messages_that_are_sent_ahead_are_answered_in_order(service: Service, wire: Wire) -> None:
    model = alone()
    with opened(service, wire) as client:
        for begin in range(0, 40, 8):
            for x in range(begin, begin + 8):
                client.send(x)
            for x in range(begin, begin + 8):
                assert client.receive() == expected(model, x)


@pytest.mark.parametrize("message", ["text", b"\xc1", b"", bytes(9)])
def test_what_is_no_step_is_refused_and_moves_nothing(service: Service, wire: Wire, message: bytes | str) -> None:
    model = alone()
    with opened(service, wire) as client:
        for x in range(4):
            assert client.is_refused(message)
            assert client.act(x) == expected(model, x)


def test_control_frames_and_fragments_are_understood(service: Service, wire: Wire, routed: list[Any]) -> None:
    model = alone()
    with opened(service, wire) as client:
        for x in range(4):
            assert client.act(x) == expected(model, x)
            assert client.ws.ping().wait(60)
        message = wire.message(5)
        client.ws.send([message[:3], message[3:]])
        assert client.receive() == expected(model, 5)
        assert len(routed) == 1
        act_until_fast(client, model, routed)


def act_until_fast(client: Client, model: Any, routed: list[Any]) -> None:
    """The next message may come before the route offers the episode again."""

    def is_fast() -> bool:
        before = len(routed)
        assert client.act(6) == expected(model, 6)
        return len(routed) == before

    until(is_fast)


def test_a_value_out_of_bounds_is_refused_alone(wire: Wire) -> None:
    with running(SETTINGS, slow=True) as service, opened(service, wire) as one, opened(service, wire) as other:
        models = [alone(), alone()]
        for x in range(3):
            one.send(1000)
            other.send(x)
            assert wire.is_error(one.receive())
            assert other.receive() == expected(models[1], x)
            assert one.act(x) == expected(models[0], x)


def test_what_the_policy_refuses_moves_nothing(service: Service, wire: Wire) -> None:
    runtime, model = service.registry.runtimes[1], alone()
    with opened(service, wire) as client:
        assert client.act(1) == expected(model, 1)
        runtime.failing = True
        try:
            assert wire.is_error(client.act(2))
        finally:
            runtime.failing = False
        assert client.act(3) == expected(model, 3)


def test_an_episode_stays_on_its_version(wire: Wire) -> None:
    with running(SETTINGS) as service, opened(service, wire) as client:
        model = alone()
        assert client.act(1) == expected(model, 1)
        service.publish()
        assert client.act(2) == expected(model, 2)
        with opened(service, wire) as other:
            assert other.act(1) == expected(alone(version=2), 1)


@pytest.mark.parametrize("flag", [True, np.array(True)], ids=["bool", "array"])
def test_a_robot_that_begins_anew_acts_with_the_live_version(flag: Any, routed: list[Any]) -> None:
    with running(SETTINGS) as service, opened(service, WIRES["openpi"]) as client:
        assert client.act(1) == expected(alone(), 1)
        service.publish()
        client.ws.send(pack({"x": np.array(3), "is_init": flag}, of_openpi))
        model = alone(version=2)
        assert client.receive() == expected(model, 3)
        assert len(routed) == 1
        act_until_fast(client, model, routed)


def test_a_drain_answers_the_step_in_progress(wire: Wire) -> None:
    with running(SETTINGS, slow=True) as service, opened(service, wire) as busy, opened(service, wire) as idle:
        gate = service.hold()
        busy.send(1)
        until(lambda: service.registry.policies[1].statistics().waiting == 1)
        service.drain()
        assert closing(idle.ws) == (1012, "service restart")
        gate.set()
        assert busy.receive() == expected(alone(), 1)
        assert closing(busy.ws) == (1012, "service restart")


def test_a_killed_client_leaves_nothing_behind(wire: Wire) -> None:
    with running(SETTINGS, slow=True) as service:
        policy, memory = service.registry.policies[1], service.memory
        arena = policy.batcher.arena
        assert arena is not None
        held_bytes, rows = memory.taken_bytes, arena.free
        gate = service.hold()
        for _ in range(3):
            client = opened(service, wire).__enter__()
            client.send(1)
            until(lambda: policy.statistics().waiting > 0)
            kill(client.ws.socket)
        gate.set()
        until(lambda: not service.connections and not service.tasks)
        assert (policy.statistics().waiting, arena.free, memory.taken_bytes) == (0, rows, held_bytes)


def test_half_a_message_leaves_nothing_behind(service: Service, wire: Wire) -> None:
    with opened(service, wire) as client:
        client.act(1)
        held_bytes = service.memory.taken_bytes
        other = opened(service, wire).__enter__()
        other.ws.socket.sendall(frame(wire.message(1))[:-5])
        kill(other.ws.socket)
        until(lambda: service.memory.taken_bytes == held_bytes)


def test_a_message_is_charged_once(tmp_path: Path, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    charged: list[int] = []
    monkeypatch.setattr(Token, "charge", lambda _self, items=1: charged.append(items))
    token = add_token(tmp_path / "tokens", "arm")
    settings = SETTINGS.model_copy(update={"tokens": tmp_path / "tokens"})
    headers = {"Authorization": f"Bearer {token}"}
    with running(settings) as service, opened(service, wire, additional_headers=headers) as client:
        charged.clear()
        for x in range(5):
            client.act(x)
        assert charged == [1] * 5
        client.is_refused(b"\xc1")  # the fast path leaves it to the route
        assert charged == [1] * 6


def test_messages_without_memory_are_refused(wire: Wire) -> None:
    with running(SETTINGS) as service, opened(service, wire) as client:
        model, memory = alone(), service.memory
        assert client.act(1) == expected(model, 1)
        free_bytes = memory.free_bytes
        memory.take(free_bytes)
        refused = client.act(2) if wire.path != "/stream" else None
        memory.give_back(free_bytes)
        assert refused is None or wire.is_error(refused)
        assert client.act(3) == expected(model, 3)


def test_a_client_that_reads_nothing_waits(wire: Wire) -> None:
    """Its replies fill the buffers of the sockets; then its messages wait there, too."""
    with running(SETTINGS) as service, opened(service, wire, max_queue=1) as client, opened(service, wire) as other:
        client.ws.socket.settimeout(2.0)
        with suppress(TimeoutError):
            while True:
                client.ws.socket.sendall(100 * frame(wire.message(1)))
        assert other.act(1) == expected(alone(), 1)
        kill(client.ws.socket)
        until(lambda: len(service.connections) == 1)
