"""The cores that this process may use: its CPU affinity and the CPU quota of its control groups."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

MOUNTED = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """At least 1. A quota of 1.5 CPUs is 1 core: a second thread would be stopped for half of the time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, math.floor(min(quota(OWN, MOUNTED), allowed))))


def quota(own: Path, mounted: Path) -> float:
    """The CPUs that the groups listed in `own` may use together; infinity without a limit.

    The group and all groups around it can have a limit: control groups version 2 in `cpu.max`, version 1 in
    `cpu.cfs_quota_us`. `mounted` is the folder of the groups.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return math.inf
    found = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += _limits(mounted, path, _version_2)
        elif "cpu" in controllers.split(","):
            found += _limits(mounted / "cpu", path, _version_1)
    return min(found)


def _limits(root: Path, path: str, read: Callable[[Path], float]) -> Iterator[float]:
    folder = root / path.strip("/")
    for group in (folder, *folder.parents):
        if group == root or root in group.parents:
            with suppress(OSError, ValueError):
                yield read(group)


def _version_2(group: Path) -> float:
    most, period = (group / "cpu.max").read_text().split()
    return math.inf if most == "max" else int(most) / int(period)


def _version_1(group: Path) -> float:
    most, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return math.inf if most < 0 else most / period
