"""Fuzzes the limits of programs, and times them. Run: python -m tests.benchmarks.fuzz_limits --inputs 100000000

Two small policies, one continuous and one discrete, each exported with and without limits. Every program with limits
gets `--inputs` fuzzed steps, as `actserve_export.certify.limits` makes them. The first step that leads out of the
limits ends the run with exit code 1. Then the CPU time of a call with limits is compared with that of a call without.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from actserve.core.errors import Disagreement
from actserve.core.signature import Arrays
from actserve.engine.runtimes.load import load
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve_export.certify.limits import POOL, Findings, fuzz
from actserve_export.programs.cost import first
from actserve_export.publish import export
from actserve_export.sources import samples
from actserve_export.sources.policy_source import PolicySource
from tests import policies
from tests.exported import made_once

POLICIES: dict[str, tuple[Callable[[], PolicySource], dict[str, Any]]] = {
    "continuous": (
        lambda: PolicySource(*policies.deterministic_control()),
        {"action": {"low": [-0.5, -0.4], "high": 0.5, "change": 0.1, "fallback": "hold"}},
    ),
    "discrete": (policies.cart, {"action": {"forbidden": [1], "dwell": 3, "fallback": "hold"}}),
}
RUNTIMES = ("onnx", "pt2")
BATCHES = (1, 64)
ROUNDS, CALLS = 15, 200  # of the comparison; a round has so many calls with limits, and as many without
REPORT_S = 5.0


def prepare() -> ModelStore:
    """A store with each policy as NAME, and as NAME-free without limits; kept until the exporter changes."""

    def make(folder: Path) -> None:
        for name, (source, limits) in POLICIES.items():
            export(source(), name, folder, limits=limits)
            export(source(), f"{name}-free", folder)

    return ModelStore(made_once("fuzz-limits", make, [Path(__file__), Path(policies.__file__)]))


def fuzzed(name: str, runtime: str, artifact: Artifact, inputs: int, seed: int, console: Console) -> Findings:
    """Fuzz one program, with a line on the progress every few seconds. Raises `Disagreement`."""
    source, _ = POLICIES[name]
    signature = artifact.manifest.signature
    program = load(runtime, artifact)
    begun_s = reported_s = time.monotonic()

    def progress(findings: Findings) -> None:
        nonlocal reported_s
        now_s = time.monotonic()
        if now_s - reported_s > REPORT_S:
            reported_s = now_s
            rate = findings.inputs / (now_s - begun_s)
            console.print(f"  {name}.{runtime}: {findings.inputs:,} of {inputs:,}, {rate:,.0f} a second")

    try:
        pool = samples.collect(source(), signature, POOL)
        return fuzz(f"{name}.{runtime}", program.run_unchecked, signature, pool, inputs, seed=seed, progress=progress)
    finally:
        program.close()


def call_us(run: Callable[[Arrays], Arrays], inputs: Arrays) -> float:
    """Microseconds of CPU time of a call, over `CALLS`: other work on the machine counts little."""
    begun_ns = time.process_time_ns()
    for _ in range(CALLS):
        run(inputs)
    return (time.process_time_ns() - begun_ns) / CALLS / 1000


def cost(name: str, runtime: str, store: ModelStore, batch: int) -> tuple[float, float]:
    """(microseconds of CPU time of a call with limits, and without): medians of rounds in turn."""
    runs, programs = [], []
    for artifact in (store.resolve(name), store.resolve(f"{name}-free")):
        program = load(runtime, artifact)
        pool = samples.collect(POLICIES[name][0](), artifact.manifest.signature, POOL)
        programs.append(program)
        runs.append((program.run, first(pool, batch)))
    rounds = [[call_us(*each) for each in runs] for _ in range(ROUNDS)]
    for program in programs:
        program.close()
    with_limits, without = (median(each) for each in zip(*rounds, strict=True))
    return with_limits, without


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="fuzzed steps for each of the four programs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console(highlight=False)
    console.print("exporting, unless it is in the cache")
    store = prepare()
    total = 0
    for name in POLICIES:
        for runtime in RUNTIMES:
            try:
                found = fuzzed(name, runtime, store.resolve(name), arguments.inputs, arguments.seed, console)
            except Disagreement as error:
                console.print(error.message)
                return 1
            total += found.inputs
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in found.reasons.items())
            console.print(
                f"{name}.{runtime}: {found.inputs:,} inputs, 0 outside, {found.refused} refused, "
                f"{found.limited:,} limited ({reasons})"
            )
    console.print(f"{total:,} inputs on {len(POLICIES) * len(RUNTIMES)} programs, none outside")
    for name in POLICIES:
        for runtime in RUNTIMES:
            for batch in BATCHES:
                ours, free = cost(name, runtime, store, batch)
                console.print(
                    f"{name}.{runtime}, batch {batch}: {ours:.1f} µs with limits, {free:.1f} µs without, "
                    f"ratio {ours / free:.2f}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
