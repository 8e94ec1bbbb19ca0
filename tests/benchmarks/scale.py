"""The cost of Ray Serve, and its gain. Run: python -m tests.benchmarks.scale

Raw screens to `/act`: one connection that waits for each answer, then many at once. `actserve serve` with as many
workers is asked in turns with Ray's replicas, behind Ray's proxy and behind HAProxy, round after round, so that
whatever else the machine does falls on all.
All of it shares this machine: Ray's proxy, the replicas and the load generator. Other work on
the machine changes times and rates. It changes the CPU time per action of all of a service's processes the least.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from actserve.cli.tools import local_service as local
from actserve.loadtest.generator import LoadReport, load
from tests.benchmarks.server import core_busy_s, cpu_s, tree
from tests.scale_service import PYTHON, running

SIZES = (1, 2)  # workers, replicas
WARM_UP_S = 0.5
PATIENCE_MS = 2000  # a slow moment of the machine is to be measured, not refused


@dataclass(frozen=True)
class Service:
    url: str
    pid: int  # of the process that started all others


def ask(url: str, policy: str, concurrency: int, seconds: float) -> LoadReport:
    report = load(url, policy=policy, concurrency=concurrency, duration_s=seconds, processes=1)
    if report.errors or not report.requests:
        raise SystemExit(f"{url}: {report.requests} good answers, errors: {report.errors}")
    return report


def measure(services: dict[str, Service], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the rounds, one row a service; the services take turns."""
    alone: dict[str, list[LoadReport]] = {name: [] for name in services}
    together: dict[str, list[LoadReport]] = {name: [] for name in services}
    cost_s: dict[str, list[float]] = {name: [] for name in services}
    for service in services.values():
        ask(service.url, arguments.policy, arguments.concurrency, WARM_UP_S)
    for _ in range(arguments.rounds):
        for name, service in services.items():
            alone[name].append(ask(service.url, arguments.policy, 1, arguments.seconds))
            pids = tree(service.pid)
            before_s = cpu_s(pids)
            report = ask(service.url, arguments.policy, arguments.concurrency, arguments.seconds)
            cost_s[name].append((cpu_s(pids) - before_s) / report.requests)
            together[name].append(report)
    return [
        {
            "service": name,
            "alone_p50_ms": median(report.latency_ms["p50"] for report in alone[name]),
            "alone_p99_ms": median(report.latency_ms["p99"] for report in alone[name]),
            "rate": median(report.rate for report in together[name]),
            "p50_ms": median(report.latency_ms["p50"] for report in together[name]),
            "p99_ms": median(report.latency_ms["p99"] for report in together[name]),
            "cpu_ms": median(cost_s[name]) * 1e3,
            "client_cpu": max(report.client_cpu for report in together[name]),
        }
        for name in services
    ]


def busy_before() -> float:
    """The share of all cores that others use."""
    cores = range(os.cpu_count() or 1)
    before_s, begun = sum(map(core_busy_s, cores)), time.perf_counter()
    time.sleep(1)
    return (sum(map(core_busy_s, cores)) - before_s) / (time.perf_counter() - begun) / len(cores)


def show(rows: list[dict[str, Any]], concurrency: int) -> None:
    first, *_ = rows
    header = (
        "p50 ms",
        "p99 ms",
        f"actions/s, {concurrency} at once",
        "×",
        "p50 ms",
        "p99 ms",
        "CPU ms/action",
        "generator",
    )
    table = Table("", *header)
    for row in rows:
        table.add_row(
            row["service"],
            f"{row['alone_p50_ms']:.2f}",
            f"{row['alone_p99_ms']:.2f}",
            f"{row['rate']:,.0f}",
            f"{row['rate'] / first['rate']:.2f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['cpu_ms']:.2f}",
            f"{row['client_cpu']:.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("models_store"))
    parser.add_argument("--policy", default="pong")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not PYTHON.exists():
        raise SystemExit("Ray is not installed: make .venv/ray/installed")
    store = str(arguments.store.resolve())
    busy = busy_before()
    rows = []
    for size in SIZES:
        with ExitStack() as stack:
            patient = {**os.environ, "ACTSERVE_MAX_WAIT_MS": str(PATIENCE_MS)}
            options = ("--runtime", "onnx", "--workers", str(size))
            plain = stack.enter_context(local.serve(store, *options, environment=patient))
            replicas: dict[str, Any] = {"store": store, "runtime": "onnx", "replicas": size, "max_wait_ms": PATIENCE_MS}
            proxied = stack.enter_context(running((size,), **replicas))
            direct = stack.enter_context(running((size,), haproxy=True, **replicas))
            services = {
                f"serve, {size}": Service(plain.url, plain.pid),
                f"Ray Serve, {size}": Service(proxied.url, proxied.process.pid),
                f"Ray Serve behind HAProxy, {size}": Service(direct.url, direct.process.pid),
            }
            rows += measure(services, arguments)
    if arguments.json:
        print(json.dumps({"busy_before": busy, "cores": os.cpu_count(), "services": rows}))
        return
    show(rows, arguments.concurrency)
    print(f"{os.cpu_count()} logical cores, {busy:.0%} busy before it began; × is against `serve` with one worker.")


if __name__ == "__main__":
    main()
