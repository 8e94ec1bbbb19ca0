"""The cost of sessions. Run: python -m tests.benchmarks.sessions

Sessions of a policy with the state of an LSTM of 256 units (2 x 256 float32: 2,048 bytes): bytes per idle session on
disk and in this process, and microseconds that a step has on top of the policy's own time, alone and while another
process steps sessions of the same file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from actserve.core.settings import Settings
from actserve.core.signature import Arrays, Signature, State, TensorSpec
from actserve.engine.policy import Acted, Policy
from actserve.engine.registry import Registry
from actserve.server.sessions import Session, SessionLimits, Sessions
from actserve.store.local import ModelStore

OBSERVATION = TensorSpec("observation", "float32", (4,))
SIGNATURE = Signature(
    observations=(OBSERVATION,),
    outputs=(TensorSpec("action", "int64", ()), TensorSpec("action_value", "float32", (6,))),
    max_batch=256,
    state=tuple(State(TensorSpec(name, "float32", (1, 256)), f"next_{name}") for name in ("hidden", "cell")),
    is_init=True,
)
STATE_BYTES = sum(state.spec.item_bytes for state in SIGNATURE.state)
ALLOWED_BYTES = 2048  # beside the state


class Instant(Policy):
    """Takes no time, so that all that is left is the sessions' own."""

    def __init__(self) -> None:
        self.signature, self.recorder = SIGNATURE, None
        rng = np.random.default_rng(0)
        self._outputs = {spec.name: spec.sample(rng, 1) for spec in SIGNATURE.outputs}
        self._state = {state.spec.name: state.spec.sample(rng, 1) for state in SIGNATURE.state}

    async def act(
        self,
        tensors: Arrays,
        size: int,
        exploration: object = None,
        seed: object = None,
        patience_ns: int = 0,
        recorder: object = None,
    ) -> Acted:
        return Acted(self._outputs | self._state, None, 0, 0)


class OnePolicy(Registry):
    def __init__(self) -> None:
        super().__init__(ModelStore(Path("nowhere")), Settings())
        self._policy = Instant()

    async def get(self, name: str | None = None, version: int | None = None) -> Policy:
        return self._policy

    async def resume(self, name: str, version: int) -> Policy:
        return self._policy


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def file_bytes(folder: Path) -> int:
    """The database and what SQLite keeps beside it."""
    return sum(file.stat().st_size for file in folder.iterdir())


async def step_all(sessions: Sessions, begun: list[Session], rounds: int) -> list[float]:
    """As an HTTP request does it: find the session, then step it. Microseconds of each step."""
    registry, tensors = OnePolicy(), {"observation": OBSERVATION.zeros(1)}
    taken = []
    for _ in range(rounds):
        for session in begun:
            start = time.perf_counter()
            found = sessions.get(session.policy, session.id)
            await sessions.step(registry, found, tensors, found.step + 1)
            taken.append((time.perf_counter() - start) * 1e6)
    return taken


def worker(path: Path, ids: list[Session], seconds: float) -> None:
    """Another process at work on sessions of its own."""
    with Sessions(path, SessionLimits()) as sessions:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            asyncio.run(step_all(sessions, ids, 1))


@contextmanager
def company(path: Path, begun: list[Session]) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=worker, args=(path, begun, 600.0))
    process.start()
    time.sleep(3)  # until it has imported and begun
    try:
        yield
    finally:
        process.terminate()
        process.join()


def percentiles(taken: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(taken, n=1000)
    return {"mean": statistics.mean(taken), "p50": cuts[499], "p99": cuts[989], "p999": cuts[998]}


def measure(path: Path, count: int) -> dict[str, Any]:
    # The first use of everything is slow, and not a part of the measurement.
    with Sessions(path.with_name("warm"), SessionLimits()) as sessions:
        asyncio.run(step_all(sessions, [sessions.begin("p", 1)], 100))
    for file in path.parent.iterdir():
        file.unlink()
    before = rss_bytes()
    with Sessions(path, SessionLimits(sessions=count, bytes=1 << 30)) as sessions:
        start = time.perf_counter()
        begun = [sessions.begin("pong-lstm", 1, owner=f"owner {index}").id for index in range(count)]
        begin_us = (time.perf_counter() - start) * 1e6 / count
        found = [sessions.get("pong-lstm", id_) for id_ in begun]
        del begun
        asyncio.run(step_all(sessions, found, 2))
        alone = asyncio.run(step_all(sessions, found[:1000], 10))
        held, on_disk = sessions.statistics(), file_bytes(path.parent)
        assert held.sessions == count
        rest = found[:200]
        del found
        grown = rss_bytes() - before
        with company(path, rest[100:]):
            together = asyncio.run(step_all(sessions, rest[:100], 100))
        start = time.perf_counter()
    with Sessions(path, SessionLimits()):
        open_ms = (time.perf_counter() - start) * 1e3
    return {
        "sessions": count,
        "state_bytes": STATE_BYTES,
        "file_bytes_each": on_disk / count,
        "process_bytes_each": grown / count,
        "beside_state_bytes_each": (on_disk + grown) / count - STATE_BYTES,
        "begin_us": begin_us,
        "step_us": percentiles(alone),
        "step_us_beside_another_process": percentiles(together),
        "open_ms": open_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder) / "sessions.sqlite", arguments.sessions)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{found['sessions']:,} idle sessions with {STATE_BYTES:,} bytes of state each:")
    print(f"  file      {found['file_bytes_each']:8,.0f} bytes each, the log beside it included")
    print(f"  process   {found['process_bytes_each']:8,.0f} bytes each")
    print(
        f"  in all    {found['beside_state_bytes_each']:8,.0f} bytes each beside the state; allowed {ALLOWED_BYTES:,}"
    )
    for title, key in (("alone", "step_us"), ("beside another process", "step_us_beside_another_process")):
        figures = ", ".join(f"{name} {value:,.0f}" for name, value in found[key].items())
        print(f"  a step    {figures} µs, {title}")
    print(f"  to begin  {found['begin_us']:,.0f} µs; to open the file {found['open_ms']:,.0f} ms")


if __name__ == "__main__":
    main()
