"""A large policy: ResNet-18 on screens of 240 x 320. Run: python -m tests.benchmarks.large

Three services, with as many workers as cores: one that chooses its threads itself, one with one thread a call, one with
all. In each round they are asked in turn, by one client and by 64. The ratios are those of a round, so that other work
on the machine slows all of them down; the table has their medians. The clients share the cores with the services.

Then the memory (PSS: pages that several processes share are divided among them) of a service with one worker and of one
with two, after each worker has answered. Their calls have one thread and one item, so that both services hold the same:
larger batches, which a service chooses where they save much, have larger activations.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actserve.cli.tools.local_service import free_port
from actserve.engine.cores import usable_cores
from actserve.engine.tuning import Tuning
from actserve.engine.tuning.tuned import Tuned
from actserve.store.local import ModelStore
from tests.benchmarks.load import Load
from tests.benchmarks.peers.program import open_session
from tests.benchmarks.questions import Questions, Screens, posts
from tests.benchmarks.resnet import NAME, SCREEN, resnet
from tests.benchmarks.server import Server, memory_mb, running

CACHE = Path(".cache/benchmarks")
CLIENTS = (1, 64)
SCREENS = 8
QUIET_WAIT_MS = "60000"  # nobody is refused
MEMORY_CLIENTS, MEMORY_S = 16, 3.0


def prepare() -> Path:
    """A store with the policy, exported unless it is in the cache."""
    made_from = [Path(__file__).with_name("resnet.py"), *sorted(Path("exporters").rglob("*.py"))]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in made_from)).hexdigest()[:12]
    store = CACHE / f"{key}-{NAME}"
    if not store.exists():
        from actserve_export.publish import export

        making = store.with_suffix(f".{os.getpid()}")
        try:
            export(resnet(), NAME, ModelStore(making), origin="tests.benchmarks.resnet", runtimes=["onnx"])
            making.rename(store)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return store


def ask(store: Path) -> Questions:
    """Random screens, with the actions of the bare program."""
    pixels = np.random.default_rng(0).integers(0, 256, (SCREENS, *SCREEN), np.uint8)
    session = open_session(str(ModelStore(store).resolve(NAME).folder / "policy.onnx"))
    actions = [int(session.run(["action"], {"observation": screen[None]})[0][0]) for screen in pixels]
    return posts()(Screens(pixels, actions))


@contextmanager
def service(store: Path, workers: int, *options: str) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "actserve", "serve", "--store", str(store), "--port", str(port)]
    command += ["--workers", str(workers), *options]
    environment = {"ACTSERVE_MAX_WAIT_MS": QUIET_WAIT_MS}
    with running(command, ("127.0.0.1", port), os.sched_getaffinity(0), environment) as server:
        yield server


def one_round(loads: dict[tuple[str, int], Load], seconds: float) -> dict[tuple[str, int], dict[str, Any]]:
    """Ask all services in turn. The results by contender and number of clients, JSON-able."""
    found = {}
    for (name, clients), load_ in loads.items():
        tally = load_.closed(seconds)
        found[name, clients] = {
            "p50_ms": float(np.percentile(tally.good, 50)) * 1e3 if tally.good else math.inf,
            "answers_a_second": tally.in_time / seconds,
            "errors": dict(tally.errors)
            | ({} if tally.good else {"no answer in time": 1})
            | ({"refused": len(tally.refused)} if tally.refused else {}),
        }
    return found


def ratios(rounds: Sequence[dict[tuple[str, int], dict[str, Any]]]) -> dict[str, list[float]]:
    """By round: the latency of one client to that with the best fixed number of threads; the rate to one thread's."""
    one, many = CLIENTS
    found = defaultdict(list)
    for each in rounds:
        fixed = [each[name, one]["p50_ms"] for name in ("one thread", "all cores")]
        found["p50 of one client, of the best fixed number"].append(each["automatic", one]["p50_ms"] / min(fixed))
        rates = [each[name, many]["answers_a_second"] for name in ("automatic", "one thread")]
        found[f"answers to {many} clients, of one thread each"].append(rates[0] / rates[1])
    return found


@contextmanager
def one_by_one(store: Path) -> Iterator[Path]:
    """A copy of the store in which the policy is tuned to batches of one item."""
    with TemporaryDirectory(dir=CACHE) as folder:
        copy = Path(folder) / "store"
        shutil.copytree(store, copy, copy_function=os.link)
        Tuned({"onnx": Tuning({1: 1})}).save(ModelStore(copy).resolve(NAME))
        yield copy


def memory(store: Path, questions: Questions, workers: int) -> float:
    """PSS of a whole service in MB, after its workers have answered."""
    with one_by_one(store) as tuned, service(tuned, workers, "--threads", "1") as server:
        server.first_answer_s(questions)
        with Load(server.address, questions, MEMORY_CLIENTS) as load_:
            load_.closed(MEMORY_S)
        return memory_mb(server.pids())[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--json", type=Path, metavar="FILE")
    wanted = parser.parse_args()
    progress = Console(stderr=True)
    progress.print("the policy")
    store = prepare()
    questions = ask(store)
    cores = usable_cores()
    contenders = {"automatic": (), "one thread": ("--threads", "1"), "all cores": ("--threads", str(cores))}
    rounds = []
    with ExitStack() as stack:
        servers = {}
        for name, options in contenders.items():
            servers[name] = stack.enter_context(service(store, cores, *options))
            servers[name].first_answer_s(questions)  # before the next one starts, so that it measures alone
        loads = {
            (name, clients): stack.enter_context(Load(server.address, questions, clients))
            for clients in CLIENTS
            for name, server in servers.items()
        }
        for number in range(wanted.rounds):
            rounds.append(one_round(loads, wanted.seconds))
            progress.print(f"round {number + 1}: " + ", ".join(
                f"{name} × {clients}: {found['p50_ms']:.0f} ms" for (name, clients), found in rounds[-1].items()
            ), highlight=False)  # fmt: skip
    sizes = {workers: memory(store, questions, workers) for workers in (1, 2)}
    compared = ratios(rounds)
    show(rounds, compared, sizes)
    if wanted.json:
        rows = [{"contender": n, "clients": c, **found} for each in rounds for (n, c), found in each.items()]
        wanted.json.write_text(json.dumps({"rounds": rows, "ratios": compared, "pss_mb": sizes}, indent=1) + "\n")
    return int(any(found["errors"] for each in rounds for found in each.values()))


def show(
    rounds: Sequence[dict[tuple[str, int], dict[str, Any]]], compared: dict[str, list[float]], sizes: dict[int, float]
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("threads", "clients", "p50 ms", "answers/s", "errors")
    for name, clients in rounds[0]:
        each = [found[name, clients] for found in rounds]
        p50_ms, rate = (median(row[key] for row in each) for key in ("p50_ms", "answers_a_second"))
        errors = [row["errors"] for row in each if row["errors"]]
        table.add_row(name, str(clients), f"{p50_ms:,.1f}", f"{rate:,.1f}", str(errors or ""))
    console.print(table)
    for what, values in compared.items():
        by_round = ", ".join(f"{value:.2f}" for value in values)
        console.print(f"{what}: {median(values):.2f}; by round {by_round}", highlight=False)
    one, two = sizes[1], sizes[2]
    console.print(f"memory of two workers, of one's: {two / one:.2f} ({two:.0f} and {one:.0f} MB)", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
