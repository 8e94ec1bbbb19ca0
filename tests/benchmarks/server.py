"""A server for the length of a `with`, on given cores, and what it costs: CPU time and memory of all its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.load import Address, Load
from tests.benchmarks.questions import Questions

START_WITHIN_S = 90.0
STOP_WITHIN_S = 15.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class DoesNotServe(Exception):
    """It ended, or gave no right answer in time; with the end of its log."""


@dataclass(frozen=True)
class Server:
    address: Address
    process: subprocess.Popen[bytes]
    started: float  # perf_counter

    def first_answer_s(self, questions: Questions) -> float:
        """Ask until it answers. Seconds from the process's start to its first right answer. Raises `DoesNotServe`."""
        why = ""
        while self.process.poll() is None and time.perf_counter() < self.started + START_WITHIN_S:
            try:
                with Load(self.address, questions, 1) as load:
                    tally = load.closed(0)
            except (OSError, ValueError) as error:
                why = str(error)
            else:
                if tally.good:
                    return time.perf_counter() - self.started
                why = str(dict(tally.errors))
            time.sleep(0.01)
        raise DoesNotServe(f"no right answer: {why}; exit code {self.process.poll()}")

    def pids(self) -> set[int]:
        return tree(self.process.pid)


def tree(root: int) -> set[int]:
    """`root` and all that it started."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found = {root} & parents.keys()
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return found


def cpu_s(pids: set[int]) -> float:
    """User and system time of all their threads, from the processes' POSIX clocks (clock_getcpuclockid(3)), as
    /proc/<pid>/stat counts in ticks of 10 ms. Raises OSError if one is gone."""
    return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in pids) / 1e9


def memory_mb(pids: set[int]) -> tuple[float, float]:
    """(RSS, PSS): what is resident; and the same with what several share divided among them."""
    found = {"Rss": 0, "Pss": 0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] += int(value.split()[0])
    return found["Rss"] * 1024 / 1e6, found["Pss"] * 1024 / 1e6


def core_busy_s(core: int) -> float:
    """Seconds that one core has not been idle since the machine came up, whoever used it."""
    (line,) = (line for line in Path("/proc/stat").read_text().splitlines() if line.startswith(f"cpu{core} "))
    user, nice, system, _idle, _iowait, *interrupts = map(int, line.split()[1:9])
    return (user + nice + system + sum(interrupts)) * TICK_S


def pinned(*on: int) -> partial[None]:
    """For `Popen(preexec_fn=…)`: the process and all that it starts run on these cores and nowhere else."""
    return partial(os.sched_setaffinity, 0, set(on))


def cores() -> tuple[int, int]:
    """(the server's, the load generator's); the same where there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


@contextmanager
def running(
    command: Sequence[str], address: Address, on: Collection[int], environment: Mapping[str, str]
) -> Iterator[Server]:
    """Started, not necessarily ready. Nothing is left of it in the end. Raises `DoesNotServe` with the log's end."""
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
            preexec_fn=pinned(*on),
        )
        try:
            yield Server(address, process, started)
        except (DoesNotServe, OSError, ValueError) as error:
            log.seek(0)
            raise DoesNotServe(f"{error}\n{log.read().decode(errors='replace')[-1500:]}") from error
        finally:
            stop(process)


def stop(process: subprocess.Popen[Any], known: Iterable[int] = ()) -> None:
    """With all that it started; of what it started earlier, the `known`."""
    pids = tree(process.pid).union(known)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_WITHIN_S)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
