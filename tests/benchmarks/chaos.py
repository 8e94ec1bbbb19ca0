"""Does anything stay half dead? Run: python -m tests.benchmarks.chaos [--minutes 10] [--seed 0]

A service with two workers. Fault after fault, in an order that the seed decides, while a client of every door holds
every answer against the policies run alone. Reported: wrong answers, lost state, how long each door stayed silent after
a fault had ended, memory, open files, and the longest turn of the event loop.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import urllib3
from rich.console import Console
from rich.table import Table

from actserve.store.local import ModelStore
from tests.benchmarks.chaos_clients import Clients, Door, Models
from tests.benchmarks.chaos_faults import FAULTS, Service
from tests.shipped import ship

SILENT_S = 5.0  # a door may be silent for so long after a fault has ended
WAIT_S = 60.0  # for the answer of a door, before it counts as dead
LAG = re.compile(r"^actserve_loop_lag_max_seconds (\S+)", re.MULTILINE)


@dataclass
class Outcome:
    """The results of a run. `silent_s` is the longest time that a door was silent, by fault and door."""

    doors: dict[str, Door]
    silent_s: dict[str, dict[str, float]] = field(default_factory=dict)
    memory_mb: list[float] = field(default_factory=list)  # at the begin, and after each round of all faults
    files: list[int] = field(default_factory=list)
    lag_s: float = 0.0  # the longest turn of the event loop, pauses included
    exit_code: int = -1

    def problems(self, silent_s: float = SILENT_S) -> list[str]:
        """Everything that must not be. No door may be silent for longer than `silent_s` after a fault."""
        found = [f"{door.name}: {text}" for door in self.doors.values() for text in (*door.wrong, *door.lost)]
        found += [f"{door.name}: no right answer" for door in self.doors.values() if not door.right]
        for fault, doors in self.silent_s.items():
            found += [f"{door} silent for {s:.1f} s after {fault}" for door, s in doors.items() if s > silent_s]
        if self.exit_code:
            found.append(f"the service ended with {self.exit_code}")
        return found


def run(
    seconds: float, seed: int, faults: Sequence[str] = tuple(FAULTS), lasts_s: float = 3.0, pause_s: float = 1.0
) -> Outcome:
    """Run all `faults` in random order, again and again for `seconds`, each at least once.

    A fault lasts for `lasts_s`, and `pause_s` later the next one begins.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        ship(folder / "store")
        service = Service(folder / "store", folder)
        clients = Clients(service.url, f"127.0.0.1:{service.grpc_port}", Models(ModelStore(folder / "store")))
        outcome = Outcome(clients.doors)
        service.start()
        clients.start()
        try:
            _wait_for_answers(clients, time.monotonic())
            _measure(service, outcome)
            end_s = time.monotonic() + seconds
            while not outcome.silent_s or time.monotonic() < end_s:
                for fault in chance.sample(list(faults), len(faults)):
                    _inflict(fault, service, clients, chance, lasts_s, outcome)
                    time.sleep(pause_s)
                    if time.monotonic() > end_s and len(outcome.silent_s) == len(faults):
                        break
                _measure(service, outcome)
        finally:
            clients.stop()
            outcome.exit_code = service.stop()
            if outcome.problems() or sys.exc_info()[1] is not None:
                sys.stderr.write(service.log.read_text(errors="replace")[-5000:])
        shutil.rmtree(folder / "store", ignore_errors=True)
    return outcome


def _inflict(
    fault: str, service: Service, clients: Clients, chance: random.Random, lasts_s: float, outcome: Outcome
) -> None:
    with cast(AbstractContextManager[None], FAULTS[fault](service, chance, lasts_s)):
        longest = _wait_for_answers(clients, time.monotonic())
    before = outcome.silent_s.setdefault(fault, {})
    for door, silent_s in longest.items():
        before[door] = max(before.get(door, 0.0), silent_s)


def _wait_for_answers(clients: Clients, ended_s: float) -> dict[str, float]:
    """How long each door takes for a right answer after `ended_s`."""
    took: dict[str, float] = {}
    while len(took) < len(clients.doors) and time.monotonic() < ended_s + WAIT_S:
        for name, door in clients.doors.items():
            if name not in took and door.right_s > ended_s:
                took[name] = door.right_s - ended_s
        time.sleep(0.01)
    return {name: took.get(name, WAIT_S) for name in clients.doors}


def _measure(service: Service, outcome: Outcome) -> None:
    outcome.memory_mb.append(service.memory_mb())
    outcome.files.append(service.files())
    text = urllib3.request("GET", service.url + "/metrics", timeout=30).data.decode()
    outcome.lag_s = max(outcome.lag_s, *(float(value) for value in LAG.findall(text)))


def report(outcome: Outcome) -> None:
    console = Console()
    table = Table("after", *outcome.doors, title="seconds until the next right answer, the longest")
    for fault, doors in sorted(outcome.silent_s.items()):
        table.add_row(fault, *(f"{doors[door]:.2f}" for door in outcome.doors))
    console.print(table)
    for door in outcome.doors.values():
        console.print(f"{door.name}: {door.right:,} right; {dict(door.others) or 'nothing else'}")
    console.print(f"memory MB: {', '.join(f'{mb:.0f}' for mb in outcome.memory_mb)}; files: {outcome.files}")
    console.print(f"longest turn of the event loop: {outcome.lag_s * 1000:.0f} ms, pauses included")
    for problem in outcome.problems():
        console.print(f"[red]{problem}[/]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(FAULTS), help="a fault; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    outcome = run(options.minutes * 60, options.seed, options.only or tuple(FAULTS))
    report(outcome)
    if options.json:
        found: dict[str, Any] = {
            "silent_s": outcome.silent_s,
            "right": {door.name: door.right for door in outcome.doors.values()},
            "memory_mb": outcome.memory_mb,
            "files": outcome.files,
            "lag_s": outcome.lag_s,
            "problems": outcome.problems(),
        }
        options.json.write_text(json.dumps(found, indent=2))
    return bool(outcome.problems())


if __name__ == "__main__":
    sys.exit(main())
