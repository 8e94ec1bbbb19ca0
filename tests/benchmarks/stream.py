"""The cost of an action through a stream, and through /act. Run: python -m tests.benchmarks.stream

One service and one client, each a process on this machine. The ways take turns, round after round, so that whatever
else the machine does falls on all of them; `stream, ahead` keeps as many messages unanswered as the service allows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from actserve.cli.tools import local_service as local
from actserve.client.remote_policy import RemotePolicy
from actserve.client.stream import Stream
from actserve.core.signature import Array

OBSERVATIONS = 32
Way = Callable[[int], list[float]]  # so many actions -> the seconds that each took


def one_by_one(act: Callable[[Array], object], observations: Array) -> Way:
    def run(count: int) -> list[float]:
        seconds = []
        for index in range(count):
            begun = time.perf_counter()
            act(observations[index % OBSERVATIONS])
            seconds.append(time.perf_counter() - begun)
        return seconds

    return run


def ahead(stream: Stream, observations: Array) -> Way:
    """From sending a message to having its reply."""

    def run(count: int) -> list[float]:
        sent: list[float] = []
        seconds: list[float] = []
        while len(seconds) < count:
            while stream.unanswered < stream.hello.window and len(sent) < count:
                sent.append(time.perf_counter())
                stream.send(observations[len(sent) % OBSERVATIONS])
            stream.receive()
            seconds.append(time.perf_counter() - sent[len(seconds)])
        return seconds

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path, default=Path("models_store"))
    parser.add_argument("--policy", default="pong")
    parser.add_argument("--runtime", default="onnx")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--actions", type=int, default=200, help="in each round, each way")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        service = stack.enter_context(local.serve(arguments.store, "--runtime", arguments.runtime))
        remote = stack.enter_context(RemotePolicy(service.url, arguments.policy))
        streams = [stack.enter_context(Stream(service.url, arguments.policy)) for _ in range(2)]
        observations = remote.signature.observations[0].sample(np.random.default_rng(0), OBSERVATIONS)
        ways = {
            "/act": one_by_one(remote.act, observations),
            "stream": one_by_one(streams[0].act, observations),
            "stream, ahead": ahead(streams[1], observations),
        }
        report = measure(ways, arguments.rounds, arguments.actions)
    if arguments.json:
        print(json.dumps(report))
        return
    for name, found in report.items():
        print(f"{name:>14}  {found['actions_a_second']:7,.0f} actions/s  p50 {found['p50_ms']:.3f} ms")


def measure(ways: dict[str, Way], rounds: int, actions: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds; the first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    halves: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            begun = time.perf_counter()
            seconds = run(actions)
            if number:
                rates[name].append(actions / (time.perf_counter() - begun))
                halves[name].append(float(np.median(seconds)))
    return {
        name: {
            "actions_a_second": round(float(np.median(rates[name])), 1),
            "p50_ms": round(float(np.median(halves[name])) * 1e3, 4),
        }
        for name in ways
    }


if __name__ == "__main__":
    main()
