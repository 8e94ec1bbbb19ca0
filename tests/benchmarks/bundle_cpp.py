"""The processor time of an action of a game that the program of a C++ bundle plays.

`python -m tests.benchmarks.bundle_cpp` plays `pong` by turns: with ONNX Runtime in this process, where only its call is
counted; and with `policy`, observations in shared memory or through a pipe, where the whole process is counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from actserve.atari.emulator import AtariGame
from actserve.core.signature import Array
from tests.bundled import artifact_of, atari
from tests.bundled_cpp import SHARED, Driver, built, driven

STEPS = 1000
ROUNDS = 7

Act = Callable[[Array], int]


def play(act: Act, spent_us: Callable[[], float], seed: int) -> float:
    """The processor time of an action, in µs."""
    environment = atari(artifact_of("pong"))
    game = AtariGame(environment, seed)
    act(game.screen())
    before = spent_us()
    for _ in range(STEPS):
        game.act(act(game.screen()))
        if game.over:
            game = AtariGame(environment, seed)
    return (spent_us() - before) / STEPS


class InProcess:
    """The bare call of ONNX Runtime."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        program = str(artifact_of("pong").folder / "policy.onnx")
        self._session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        self._spent_ns = 0

    def act(self, screen: Array) -> int:
        start = time.thread_time_ns()
        (action,) = self._session.run(["action"], {"pixels": screen[None]})
        self._spent_ns += time.thread_time_ns() - start
        return int(action[0])

    def spent_us(self) -> float:
        return self._spent_ns / 1e3


def processor_us(pid: int) -> float:
    """The processor time of a process with one thread."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e3


def through_pipe(policy: Driver, screen: Array) -> int:
    return int(policy.step({"pixels": screen})["action"])


def main() -> None:
    program = built("pong", optimized=True) / "build" / "policy"
    signature = artifact_of("pong").manifest.signature
    times: dict[str, list[float]] = {}
    bare = InProcess()
    with tempfile.NamedTemporaryFile() as file:
        memory = np.memmap(file.name, np.uint8, "w+", shape=(1, *signature.observations[0].shape))
        with driven(program, signature, "--shared", file.name) as policy:

            def in_memory(screen: Array) -> int:
                memory[0] = screen
                return int(policy.step({}, SHARED)["action"])

            spent_us = partial(processor_us, policy.process.pid)
            ways: dict[str, tuple[Act, Callable[[], float]]] = {
                "the bare call": (bare.act, bare.spent_us),
                "policy, shared memory": (in_memory, spent_us),
                "policy, a pipe": (partial(through_pipe, policy), spent_us),
            }
            for seed in range(ROUNDS):
                for way, (act, spent) in ways.items():
                    times.setdefault(way, []).append(play(act, spent, seed))
    medians = {way: statistics.median(measured) for way, measured in times.items()}
    for way, median in medians.items():
        print(f"{way:24} {median:7.1f} µs an action, {median / medians['the bare call']:.3f} x")


if __name__ == "__main__":
    main()
