"""Exports over 400 small policies, and compares what is served with the eager module: `python -m tests.survey`.

Each gets both programs, with certificates. Apart from the certificates, the programs are compared with the policy:
deterministic actions, singly and in batches, over many steps and new episodes if there is state; and the distribution
of random actions. `results.json` records each result with its commit. A run examines the policies without a result.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from actserve.core.errors import ActserveError
from actserve.store.local import ModelStore
from actserve_export.publish import RUNTIMES, export
from actserve_export.sources.policy_source import PolicySource
from tests.survey import POLICIES
from tests.survey.comparison import Differs, compare

FOUND = Path(__file__).parents[2] / ".cache" / "survey"  # what the processes found
RESULTS = Path(__file__).parent / "results.json"
LIMIT_S = 1200.0
# Imported before the processes are forked: they take a third of the time of an export.
COSTLY = (
    "onnxruntime", "onnxscript", "torch.onnx._internal.exporter._core", "torch.onnx._internal.exporter._compat",
    "torch._inductor.compile_fx", "torch._inductor.codegen.cpp_wrapper_cpu", "torch._inductor.package",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="policies whose name contains this")
    parser.add_argument("--again", action="store_true", help="also what was done already")
    parser.add_argument("--show", action="store_true", help="only print what was found")
    arguments = parser.parse_args()
    FOUND.mkdir(parents=True, exist_ok=True)
    names = [name for name in POLICIES if arguments.only in name]
    before = {} if arguments.again else recorded()
    to_do = [name for name in names if name not in before]
    if not arguments.show:
        for module in COSTLY:
            importlib.import_module(module)
        commit = _commit()
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for done, name in enumerate(pool.map(_in_a_process, to_do), 1):
                found = json.loads(_file(name).read_text())
                print(f"{done}/{len(to_do)} {name}: {found['status']}, {found['detail'][:200]}", flush=True)
                _record(name, found | {"commit": commit})
    found = {name: result for name, result in recorded().items() if name in names}
    for name, result in found.items():
        if result["status"] != "equal":
            print(f"{result['status']}: {name}: {result['detail']}")
    counts = Counter(result["status"] for result in found.values())
    print(f"{len(found)} of {len(names)} policies:", ", ".join(f"{count} {status}" for status, count in counts.items()))


def recorded() -> dict[str, dict[str, Any]]:
    """The recorded results, by the names of the policies."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {name: result for name, result in found.items() if name in POLICIES}


def _record(name: str, result: dict[str, Any]) -> None:
    results = recorded() | {name: result}
    lines = (f"{json.dumps(known)}: {json.dumps(results[known])}" for known in POLICIES if known in results)
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _file(name: str) -> Path:
    return FOUND / (name.replace("/", "-") + ".json")


def _in_a_process(name: str) -> str:
    started = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=_examine, args=(name,))
    _write(name, "crash", "the process ended", 0.0)
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        _write(name, "crash", f"took more than {LIMIT_S:.0f} s", time.monotonic() - started)
    return name


def _write(name: str, status: str, detail: str, seconds: float) -> None:
    detail = re.sub(r"/\S+/", "", detail)  # the folders of this machine
    _file(name).write_text(json.dumps({"status": status, "detail": detail, "seconds": round(seconds, 1)}))


def _examine(name: str) -> None:
    started = time.monotonic()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = POLICIES[name]()
            source = made if isinstance(made, PolicySource) else PolicySource(*made)
            artifact = export(source, "policy", ModelStore(Path(folder)), origin=name, runtimes=RUNTIMES).artifact
            status, detail = "equal", compare(source, artifact)
        except ActserveError as error:
            status, detail = "refused", error.message
        except Differs as error:
            status, detail = "wrong", str(error)
        except BaseException as error:
            status, detail = "crash", "".join(traceback.format_exception(error)[-3:])
    _write(name, status, detail, time.monotonic() - started)
    os._exit(0)


if __name__ == "__main__":
    main()
