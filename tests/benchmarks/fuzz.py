"""Bad input, a lot of it, in a bounded run: `python -m tests.benchmarks.fuzz --cases 100000`.

Half of the cases are libFuzzer's, which looks for inputs that reach new code of the decoders (needs atheris, on Linux;
without it they are mutated blindly). The others go to every decoder, to the sockets of a real server with the fast path
and without, and through schemathesis to every operation of the OpenAPI document. Exit code 1: something did harm, by a
crash, an answer of 5xx, or one that took longer than a second.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from tests import fastpath_service, fuzzing, stream_service
from tests.fake_policy import NAME as DIGEST
from tests.fastpath_service import FAST, ITEM_BYTES, PLAIN
from tests.fastpath_service import NAME as TINY
from tests.fuzzing import GUIDED

SOCKETS, SCHEMA = 0.1, 0.03  # shares of the cases
OPERATIONS = 40  # in the OpenAPI document, both ways, more or less
MEMORY_MB = 2048  # that libFuzzer grants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, report = random.Random(asked.seed), fuzzing.Report()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="actserve-") as folder:
        found = fuzzing.targets(Path(folder))
        guided = asked.cases // 2 if importlib.util.find_spec("atheris") else 0
        if guided:
            _guide(Path(folder) / "corpus", found, guided, asked.seed, report)
        sockets, schema = int(asked.cases * SOCKETS), int(asked.cases * SCHEMA)
        fuzzing.throw_at_all(found, asked.cases - guided - sockets - schema, rng, report)
    tiny, digest = (fuzzing.requests_to(name, bytes(size)) for name, size in ((TINY, ITEM_BYTES), (DIGEST, 8)))
    for http in (FAST, PLAIN):
        # Without the fast path, uvicorn's protocol logs an error whenever a client resets its connection.
        watching = fuzzing.watched(report) if http == FAST else nullcontext()
        with watching, fastpath_service.running(http) as up:
            fuzzing.throw_over_sockets(f"sockets, {http}", up.port, tiny, sockets // 3, rng, report)
    with fuzzing.watched(report), stream_service.running() as stateful:
        port = int(stateful.url.rpartition(":")[2])
        fuzzing.throw_over_sockets("sockets, with state", port, digest, sockets - 2 * (sockets // 3), rng, report)
        fuzzing.throw_by_schema(stateful.url, max(1, schema // OPERATIONS), asked.seed, report)
    print(report)
    print(f"{time.perf_counter() - begun:.0f} s, seed {asked.seed}")
    sys.exit(0 if report.harmless else 1)


def _guide(
    corpus: Path, found: dict[str, tuple[fuzzing.Target, list[bytes]]], runs: int, seed: int, report: fuzzing.Report
) -> None:
    """libFuzzer ends the process it is in: it has one of its own, begins with what is good, and reports at its end."""
    corpus.mkdir()
    for index, name in enumerate(GUIDED):
        for number, good in enumerate(found[name][1]):
            (corpus / f"{index}-{number}").write_bytes(bytes((index,)) + good)
    options = [f"-runs={runs}", f"-seed={seed + 1}", f"-timeout={fuzzing.SOON_S:.0f}", f"-rss_limit_mb={MEMORY_MB}"]
    options += ["-max_len=4096", "-print_final_stats=1", f"-artifact_prefix={corpus}/", str(corpus)]
    command = [sys.executable, "-m", "tests.benchmarks.guided", *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    units = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    slowest = re.search(r"slowest_unit_time_sec:\s+(\d+)", done.stderr)
    count = int(units[1]) if units else 0
    report.cases += count
    report.parts["decoders, guided by coverage"] = count
    report.slowest_s = max(report.slowest_s, float(slowest[1]) if slowest else 0.0)
    if done.returncode:
        report.crashes.append(f"libFuzzer: exit code {done.returncode}: {done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
