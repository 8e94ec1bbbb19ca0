"""How long from `actserve serve` to the first answer? Run: python -m tests.benchmarks.startup"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from actserve.cli.tools import local_service as local
from actserve.client.remote_policy import RemotePolicy


def measure(store: Path, runtime: str) -> float:
    """Seconds from starting the process to having the first action."""
    started = time.perf_counter()
    with local.serve(store, "--runtime", runtime) as service, RemotePolicy(service.url) as policy:
        policy.act(policy.signature.observations[0].zeros(1)[0])
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path, default=Path("models_store"))
    parser.add_argument("--runtime", default="onnx")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    seconds = [measure(arguments.store, arguments.runtime) for _ in range(arguments.runs)]
    low, high = np.min(seconds), np.max(seconds)
    print(
        f"serve to first answer, .{arguments.runtime}: median {statistics.median(seconds):.2f} s "
        f"({low:.2f} to {high:.2f}, {arguments.runs} starts)"
    )


if __name__ == "__main__":
    main()
