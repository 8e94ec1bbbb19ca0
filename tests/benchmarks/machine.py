"""The machine of a measurement, without a host name or a path."""

from __future__ import annotations

import os
import platform
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from actserve.engine.runtimes.host import cpu_model
from tests.benchmarks.contenders import OWN

HERE = ("actserve", "onnxruntime", "numpy", "uvicorn", "uvloop", "httptools", "fastapi", "mosec", "litserve")
THERE = {"bentoml": "bentoml", "triton": "nvidia-pytriton", "ray": "ray"}  # environment -> package


def describe(server_core: int, client_core: int) -> dict[str, Any]:
    """JSON-able."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "one_core": client_core in _siblings(server_core),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def sentence(machine: dict[str, Any]) -> str:
    beside = "the other thread of the same core" if machine["one_core"] else "another"
    packages = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} logical cores, {machine['memory_gb']} GB; the server on one, the load "
        f"generator on {beside}; load average {machine['load_average']:.1f} before. Linux {machine['kernel']}, Python "
        f"{machine['python']}, {packages}."
    )


def versions() -> dict[str, str]:
    """The versions of the packages that are compared and installed."""
    found = [d for name in HERE for d in Distribution.discover(name=name)]
    for folder, name in THERE.items():
        path = [str(path) for path in (OWN / folder).glob("lib/python*/site-packages")]
        found += Distribution.discover(name=name, path=path)
    return {distribution.name: distribution.version for distribution in found}


def _siblings(core: int) -> set[int]:
    """The logical cores that are one core with this one, itself among them."""
    listed = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text().strip()
    ranges = [part.split("-") for part in listed.split(",")]
    return {number for part in ranges for number in range(int(part[0]), int(part[-1]) + 1)}
