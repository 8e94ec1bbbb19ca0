"""The cost of the programs without a server: ONNX Runtime, one thread, in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from actserve.core.signature import Array
from tests.benchmarks.peers.program import open_session
from tests.benchmarks.server import pinned

BATCHES = (1, 8, 32)
TURNS = 4  # that the programs take; what disturbs one, disturbs all

Found = dict[str, dict[str, dict[str, float]]]  # program -> batch size -> cpu_us (of a screen), p50_us (of a call)


def measure(programs: Mapping[str, Path], pixels: Path, core: int, seconds: float) -> Found:
    """On `core`, `seconds` for each program and batch size. `pixels`: an .npy of (32, 210, 160, 3) u8."""
    command = [sys.executable, "-m", __name__, str(pixels), str(seconds), *map(str, programs.values())]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, preexec_fn=pinned(core)).stdout
    return dict(zip(programs, json.loads(said), strict=True))


def race(sessions: list[Any], pixels: Array, seconds: float) -> list[dict[int, dict[str, float]]]:
    found: list[dict[int, dict[str, float]]] = [{} for _ in sessions]
    for size in BATCHES:
        batches = [{"pixels": batch} for batch in np.split(pixels, len(pixels) // size)]
        cpu_s, calls_s = [0.0] * len(sessions), [list[float]() for _ in sessions]
        for turn in range(TURNS + 1):
            for index, session in enumerate(sessions):
                before_s = time.process_time()
                calls = spend(session, batches, seconds / TURNS)
                if turn:  # the first is to warm up
                    calls_s[index] += calls
                    cpu_s[index] += time.process_time() - before_s
        for index, calls in enumerate(calls_s):
            found[index][size] = {
                "cpu_us": cpu_s[index] / len(calls) / size * 1e6,
                "p50_us": statistics.median(calls) * 1e6,
            }
    return found


def spend(session: Any, batches: list[dict[str, Array]], seconds: float) -> list[float]:
    """Run the batches in turn; the seconds of each call."""
    calls: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not calls:
        begun = time.perf_counter()
        session.run(["action"], batches[len(calls) % len(batches)])
        calls.append(time.perf_counter() - begun)
    return calls


if __name__ == "__main__":
    pixels, seconds, *files = sys.argv[1:]
    print(json.dumps(race([open_session(file) for file in files], np.load(pixels), float(seconds))))
