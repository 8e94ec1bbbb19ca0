"""Whole games through the real service."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_aio
from rich.console import Console

from actserve.atari.play import Act
from actserve.atari.play import play as run_play
from actserve.cli.tools import local_service as local
from actserve.cli.tools import play_and_load as playing
from actserve.cli.tools.local_service import LocalService
from actserve.client.remote_policy import RemotePolicy
from actserve.client.state_carriers import STATE_CARRIERS
from actserve.core.signature import Array
from tests.exported import exported

STEPS = 150


def play(service: LocalService, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "actserve", "play", "--url", service.url, "--json", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_a_seeded_game_is_the_same_twice_and_with_either_runtime(both: dict[str, LocalService]) -> None:
    first, other = (play(both[runtime], "--seed", "3") for runtime in ("onnx", "pt2"))
    assert first["episodes"] == other["episodes"]
    assert (first["runtime"], other["runtime"]) == ("onnx", "pt2")
    assert first["policy"] == "pong"
    assert set(first["latency_ms"]) == {"p50", "p90", "p99", "p999"}
    (episode,) = first["episodes"]
    assert episode["seed"] == 3
    assert abs(episode["score"]) <= 21
    assert episode["steps"] > 500
    begun, again = (
        playing.play(both["onnx"].url, None, seed=3, max_steps=STEPS, console=Console(quiet=True)).episodes
        for _ in range(2)
    )
    assert begun == again


@pytest.mark.parametrize("runtimes", [("onnx",), pytest.param(("onnx", "pt2"), marks=pytest.mark.wide)])
def test_a_recurrent_policy_plays_the_same_game_by_every_way(runtimes: tuple[str, ...]) -> None:
    store = exported("pong-lstm", runtimes)
    games = {}
    for runtime in runtimes:
        port = local.free_port()
        with local.serve(store.root, "--runtime", runtime, "--grpc-port", str(port)) as service:
            for way in STATE_CARRIERS:
                report = playing.play(service.url, None, via=way, seed=3, max_steps=STEPS, console=Console(quiet=True))
                assert (report.policy, report.runtime) == ("pong-lstm", runtime)
                games[runtime, way] = report.episodes
            with RemotePolicy(service.url) as remote:
                world = remote.environment
            assert world is not None
            for client in (by_http(service), by_asyncio(service), by_grpc(port)):
                with client as (name, act):
                    games[runtime, name] = run_play(always(act), world, episodes=1, seed=3, max_steps=STEPS).episodes
    assert len(games) == len(runtimes) * (len(STATE_CARRIERS) + 3)
    first, *others = games.values()
    assert first[0].steps == STEPS
    assert all(other == first for other in others)


Client = Iterator[tuple[str, Act]]


@contextmanager
def by_http(service: LocalService) -> Client:
    """tritonclient, with a number for the sequence."""
    with triton_http.InferenceServerClient(service.url.removeprefix("http://")) as client:
        yield "tritonclient", acting(client.infer, triton_http, 77)


@contextmanager
def by_asyncio(service: LocalService) -> Client:
    """tritonclient's asynchronous client, with a name for the sequence."""

    async def connect() -> Any:
        return triton_aio.InferenceServerClient(service.url.removeprefix("http://"))

    with asyncio.Runner() as runner:
        client = runner.run(connect())
        yield (
            "tritonclient.aio",
            acting(lambda *of, **flags: runner.run(client.infer(*of, **flags)), triton_http, "my game"),
        )
        runner.run(client.close())


@contextmanager
def by_grpc(port: int) -> Client:
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield "tritonclient.grpc", acting(client.infer, triton_grpc, 78)


def acting(infer: Callable[..., Any], triton: Any, sequence: int | str) -> Act:
    """One game's steps, as a sequence."""
    steps = itertools.count()

    def act(screen: Array) -> int:
        first = next(steps) == 0
        result = infer("pong-lstm", inputs(triton, screen), sequence_id=sequence, sequence_start=first)
        return int(result.as_numpy("action")[0])

    return act


def always(act: Act) -> Callable[[int], Act]:
    """For a game of any seed."""
    return lambda _seed: act


def inputs(triton: Any, screen: Array) -> list[Any]:
    made = triton.InferInput("pixels", [1, *screen.shape], "UINT8")
    made.set_data_from_numpy(screen[None])
    return [made]
