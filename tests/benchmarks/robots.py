"""64 of openpi's clients at once. Run: python -m tests.benchmarks.robots

Each client sends an observation, waits for the actions, and sends the next one. Two servers answer in turn, in each
round, on one core: actserve, and openpi's own loop (`peers/openpi_loop.py`), both with the same `.onnx` program. The
clients have the other core (`robot_load.py`). Actions a second, and CPU time of the server for each; the ratios are
medians of rounds. In each round the last answer to each client is compared with what the program gives.

Three policies:

* `camera` is small: two cameras of 24 x 24 pixels. The messages are most of its cost.
* `vision` computes: one camera of 128 x 128 pixels, four layers.
* `head` is large: 25 million weights that each call reads from memory, as a GPU does for the policies of most robots.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actserve.cli.tools.local_service import free_port
from actserve.core.signature import Array, Arrays, TensorSpec
from actserve.server.protocols.robots.packed import of_openpi, pack, unpack
from actserve.store.local import ModelStore
from tests.benchmarks.peers.program import open_session
from tests.benchmarks.robot_load import Answers, Robots
from tests.benchmarks.server import DoesNotServe, cores, cpu_s, running
from tests.exported import exported

CLIENTS = 64
READY_WITHIN_S = 60.0
POLICIES = ("camera", "vision", "head")
MESSAGES = 8
TOLERANCE = 1e-3  # a batch is summed in another order
NEVER_REFUSE = {"ACTSERVE_MAX_WAIT_MS": "60000"}  # as openpi's loop: its clients do not ask again


@dataclass(frozen=True)
class Found:
    actions_s: float
    cpu_us: float  # of the server, for each action
    load: float  # the share of their core that the clients took


@dataclass(frozen=True)
class Questions:
    messages: list[bytes]
    actions: list[Array]  # what the program gives, one observation a call

    def check(self, answers: Answers) -> None:
        """Raises `DoesNotServe` for an answer that is not the program's."""
        for number, answer in answers.last:
            difference = np.abs(np.ravel(unpack(answer)["actions"]) - np.ravel(self.actions[number])).max()
            if not difference < TOLERANCE:
                raise DoesNotServe(f"an action differs by {difference:g} from the program's")


def questions(program: Path, specs: Sequence[TensorSpec]) -> Questions:
    rng, session = np.random.default_rng(0), open_session(str(program))
    observations: list[Arrays] = [{spec.name: spec.sample(rng, 1) for spec in specs} for _ in range(MESSAGES)]
    return Questions(
        [
            pack({name.replace("observation_", "observation/"): value[0] for name, value in each.items()}, of_openpi)
            for each in observations
        ],
        [session.run(None, each)[0][0] for each in observations],
    )


def wait_until_ready(port: int, path: str, messages: list[bytes]) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            with Robots(port, path, messages, 2) as robots:
                robots.act(0.2)
        except (OSError, DoesNotServe) as error:
            if time.monotonic() > deadline:
                raise DoesNotServe(f"not ready: {error}") from error
            time.sleep(0.2)
        else:
            return


def measure(command: list[str], port: int, asked: Questions, seconds: float, clients: int) -> Found:
    server_core, own_core = cores()
    os.sched_setaffinity(0, {own_core})
    with running(command, ("127.0.0.1", port), (server_core,), NEVER_REFUSE) as server:
        wait_until_ready(port, "/", asked.messages)
        with Robots(port, "/", asked.messages, clients) as robots:
            robots.act(0.5)
            pids = server.pids()
            before_s, own_s = cpu_s(pids), time.process_time()
            answers = robots.act(seconds)
            own_s = time.process_time() - own_s
            cpu_us = 1e6 * (cpu_s(pids) - before_s) / answers.count
        asked.check(answers)
    return Found(answers.count / answers.seconds, cpu_us, own_s / answers.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    arguments = parser.parse_args()
    table = Table("policy", "server", "actions a second", "server CPU, µs an action", "the clients' core")
    for name in POLICIES:
        store = exported(f"tests.policies_robots:{name}", ("onnx",))
        program = store.root / name / "1" / "policy.onnx"
        asked = questions(program, store.resolve(name).manifest.signature.observations)
        found: dict[str, list[Found]] = {"actserve": [], "openpi's loop": []}
        for _ in range(arguments.rounds):
            for server in found:
                port = free_port()
                command = _command(server, store, program, port)
                found[server].append(measure(command, port, asked, arguments.seconds, arguments.clients))
        for server, rounds in found.items():
            rate, cost = median(each.actions_s for each in rounds), median(each.cpu_us for each in rounds)
            load = median(each.load for each in rounds)
            table.add_row(name, server, f"{rate:,.0f}", f"{cost:,.0f}", f"{load:.0%}")
        pairs = list(zip(found["actserve"], found["openpi's loop"], strict=True))
        faster = median(ours.actions_s / theirs.actions_s for ours, theirs in pairs)
        cheaper = median(ours.cpu_us / theirs.cpu_us for ours, theirs in pairs)
        table.add_row(name, "ratio", f"{faster:.2f}", f"{cheaper:.2f}", "", end_section=True)
    Console().print(table)


def _command(server: str, store: ModelStore, program: Path, port: int) -> list[str]:
    python = [sys.executable, "-W", "ignore", "-m"]
    if server == "actserve":
        options: list[Any] = ["--store", str(store.root), "--runtime", "onnx", "--port", str(port)]
        return [*python, "actserve", "serve", *options]
    return [*python, "tests.benchmarks.peers.openpi_loop", str(program), str(port)]


if __name__ == "__main__":
    main()
