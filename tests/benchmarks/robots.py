"""64 of openpi's clients at once. Run: python -m tests.benchmarks.robots

Each client sends an observation, waits for the actions, and sends the next one. Two servers answer in turn, in each
round, on one core: actserve, and openpi's own loop (`peers/openpi_loop.py`), both with the same `.onnx` program. The
clients have the other core. Actions a second, and CPU time of the server for each; the ratios are medians of rounds.

Two policies: `camera` is small, and most of its cost is the messages; `arm` has 9 million weights, which a server that
takes one observation a call reads from memory for each.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from actserve.cli.tools.local_service import free_port
from actserve.server.protocols.robots.packed import of_openpi, pack, unpack
from actserve.store.local import ModelStore
from tests.benchmarks.server import DoesNotServe, cores, cpu_s, running
from tests.exported import exported

CLIENTS = 64
READY_WITHIN_S = 60.0
POLICIES = ("camera", "arm")


@dataclass(frozen=True)
class Found:
    actions_s: float
    cpu_us: float  # of the server, for each action


async def closed_loop(url: str, messages: list[bytes], seconds: float, clients: int) -> int:
    """The answers to all clients together."""
    answers = 0
    until_s = time.monotonic() + seconds

    async def one(number: int) -> None:
        nonlocal answers
        async with connect(url, compression=None, max_size=None, proxy=None) as socket:
            await socket.recv()
            while time.monotonic() < until_s:
                await socket.send(messages[(number + answers) % len(messages)])
                answer = await socket.recv()
                if not isinstance(answer, bytes):
                    raise DoesNotServe(answer)
                answers += 1
            assert isinstance(answer, bytes)
            assert "actions" in unpack(answer)

    await asyncio.gather(*(one(number) for number in range(clients)))
    return answers


async def ready(url: str, messages: list[bytes]) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            await closed_loop(url, messages, 0.2, 2)
        except (OSError, WebSocketException) as error:
            if time.monotonic() > deadline:
                raise DoesNotServe(f"not ready: {error}") from error
            await asyncio.sleep(0.2)
        else:
            return


def observations(store: ModelStore, name: str) -> list[bytes]:
    rng = np.random.default_rng(0)
    specs = store.resolve(name).manifest.signature.observations
    return [
        pack({spec.name.replace("observation_", "observation/"): spec.sample(rng, 1)[0] for spec in specs}, of_openpi)
        for _ in range(8)
    ]


def measure(command: list[str], path: str, port: int, messages: list[bytes], seconds: float) -> Found:
    server_core, own_core = cores()
    os.sched_setaffinity(0, {own_core})
    url = f"ws://127.0.0.1:{port}{path}"
    with running(command, ("127.0.0.1", port), (server_core,), {}) as server:
        asyncio.run(ready(url, messages))
        asyncio.run(closed_loop(url, messages, 0.5, CLIENTS))
        pids = server.pids()
        before_s, begun_s = cpu_s(pids), time.monotonic()
        answers = asyncio.run(closed_loop(url, messages, seconds, CLIENTS))
        return Found(answers / (time.monotonic() - begun_s), 1e6 * (cpu_s(pids) - before_s) / answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    table = Table("policy", "server", "actions a second", "server CPU, µs an action")
    for name in POLICIES:
        store = exported(f"tests.policies_robots:{name}", ("onnx",))
        program, messages = store.root / name / "1" / "policy.onnx", observations(store, name)
        found: dict[str, list[Found]] = {"actserve": [], "openpi's loop": []}
        for _ in range(arguments.rounds):
            for server in found:
                port = free_port()
                found[server].append(
                    measure(*_command(server, store, program, port), port, messages, arguments.seconds)
                )
        for server, rounds in found.items():
            rate, cost = median(each.actions_s for each in rounds), median(each.cpu_us for each in rounds)
            table.add_row(name, server, f"{rate:,.0f}", f"{cost:,.0f}")
        pairs = list(zip(found["actserve"], found["openpi's loop"], strict=True))
        faster = median(ours.actions_s / theirs.actions_s for ours, theirs in pairs)
        cheaper = median(ours.cpu_us / theirs.cpu_us for ours, theirs in pairs)
        table.add_row(name, "ratio", f"{faster:.2f}", f"{cheaper:.2f}", end_section=True)
    Console().print(table)


def _command(server: str, store: ModelStore, program: Path, port: int) -> tuple[list[str], str]:
    """(the command, the path of its WebSocket)."""
    python = [sys.executable, "-W", "ignore", "-m"]
    if server == "actserve":
        options: list[Any] = ["--store", str(store.root), "--runtime", "onnx", "--port", str(port)]
        return [*python, "actserve", "serve", *options], "/"
    return [*python, "tests.benchmarks.peers.openpi_loop", str(program), str(port)], ""


if __name__ == "__main__":
    main()
