"""Streams from the real service, over real sockets, with policies that were exported for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actserve.atari.play import play
from actserve.cli.tools import local_service as local
from actserve.cli.tools.local_service import LocalService
from actserve.client.remote_policy import RemotePolicy
from actserve.client.stream import Stream
from actserve.core.errors import ServiceError, ServiceUnreachable
from actserve.core.signature import Array
from tests.exported import exported, merged
from tests.waiting import until


@pytest.fixture(scope="module", params=["onnx", pytest.param("pt2", marks=pytest.mark.wide)])
def recurrent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """`pixel-lstm`: small screens, a CNN, an LSTM; `ornstein-uhlenbeck`: noise that has a state."""
    stores = [exported(f"tests.policies:{kind}", [request.param]) for kind in ("pixel_lstm", "ornstein_uhlenbeck")]
    root = merged(stores, tmp_path_factory.mktemp("recurrent")).root
    with local.serve(root, "--runtime", request.param) as service:
        yield service


def test_the_hello_has_the_environment(service: LocalService) -> None:
    with RemotePolicy(service.url) as remote, Stream(service.url) as stream:
        assert stream.environment == remote.environment
        assert (stream.hello.policy, stream.hello.version, stream.hello.runtime) == (
            remote.name,
            remote.version,
            remote.runtime,
        )


def test_a_stream_acts_as_act_does(service: LocalService, screens: Array) -> None:
    with RemotePolicy(service.url) as remote, Stream(service.url, "pong", 1, outputs=["action_value"]) as stream:
        for screen in screens[:64]:
            assert stream.act(screen) == remote.act(screen) == np.argmax(stream.outputs["action_value"])


def test_a_whole_stretch_of_a_game_is_the_same_through_a_stream(service: LocalService) -> None:
    with RemotePolicy(service.url) as remote, Stream(service.url) as stream:
        assert remote.environment is not None
        by_http = play(lambda _seed: remote.act, remote.environment, episodes=1, seed=3, max_steps=200)
        by_stream = play(lambda _seed: stream.act, remote.environment, episodes=1, seed=3, max_steps=200)
    assert by_http.episodes == by_stream.episodes


def test_the_state_of_a_stream_is_the_one_a_client_would_carry(recurrent: LocalService) -> None:
    with (
        RemotePolicy(recurrent.url, "pixel-lstm") as remote,
        Stream(recurrent.url, "pixel-lstm", outputs=["action_value"]) as stream,
    ):
        spec = stream.signature.observations[0]
        frames = spec.sample(np.random.default_rng(4), 40)
        episode = remote.episode(["action_value"])
        for number, frame in enumerate(frames):
            reset = number == 25
            if reset:
                episode = remote.episode(["action_value"])
            action = stream.act({spec.name: frame, "is_init": np.array(True)} if reset else frame)
            assert action == episode.act(frame)
            np.testing.assert_array_equal(stream.outputs["action_value"], episode.outputs["action_value"])


def test_a_seed_gives_the_same_random_episode_either_way(recurrent: LocalService) -> None:
    name = "ornstein-uhlenbeck"
    with RemotePolicy(recurrent.url, name) as remote:
        spec = remote.signature.observations[0]
        items = spec.sample(np.random.default_rng(4), 20)
        episode = remote.episode(exploration="random", seed=11)
        expected = [episode.act(item) for item in items]
    for seed, same in ((11, True), (12, False)):
        with Stream(recurrent.url, name, exploration="random", seed=seed) as stream:
            assert np.array_equal([stream.act(item) for item in items], expected) == same


def test_the_answer_in_flight_arrives_before_the_service_goes(pong_store: Path, screens: Array) -> None:
    with (
        local.serve(pong_store, "--runtime", "onnx") as service,
        Stream(service.url) as stream,
        Stream(service.url) as idle,
    ):
        actions = [stream.act(screen) for screen in screens[:8]]
        killer = threading.Timer(0.3, os.kill, (service.pid, signal.SIGTERM))
        killer.start()
        steps = stream.steps
        with pytest.raises(ServiceUnreachable) as over:
            act_on(stream, screens[:8], actions)
        assert stream.steps > steps
        assert over.value.detail["close_code"] == 1012
        with pytest.raises(ServiceUnreachable) as over:
            idle.act(screens[0])
        assert over.value.detail["close_code"] == 1012
        killer.join()


def act_on(stream: Stream, screens: Array, actions: list[int]) -> None:
    """On and on, each screen with its action."""
    while True:
        index = stream.steps % len(actions)
        assert stream.act(screens[index]) == actions[index]


def test_killed_clients_leave_nothing_behind(service: LocalService, screens: Array) -> None:
    with Stream(service.url) as steady:
        before = open_files(service)
        streams = [Stream(service.url) for _ in range(20)]
        for stream in streams:
            stream.__enter__()
            stream.send(screens[0])
            stream._socket.socket.close()
        until(lambda: open_files(service) <= before)
        assert type(steady.act(screens[0])) is int


def open_files(service: LocalService) -> int:
    (worker,) = service.workers
    return len(os.listdir(f"/proc/{worker}/fd"))


def test_a_version_that_is_no_number(service: LocalService) -> None:
    with RemotePolicy(service.url) as remote:
        stream = Stream(service.url, remote.name, version=7)
    with pytest.raises(ServiceError, match="unknown_version"):
        stream.__enter__()
