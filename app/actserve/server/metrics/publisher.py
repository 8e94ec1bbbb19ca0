"""Publisher: what makes a scrape of one worker one of the service."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path

from actserve.engine.registry import Registry
from actserve.server.metrics.collect import collect
from actserve.server.sessions import Sessions
from actserve.telemetry.counts import ProgramLabels
from actserve.telemetry.counts_file import CountsFile
from actserve.telemetry.families import Families

log = logging.getLogger("actserve")

EVERY_S = 1.0
RATE_OVER_S = 10


class Publisher:
    """One worker's. Enter it before there is anything to count, leave it after. `path`: of the file that all workers
    share; None: there are no others."""

    def __init__(self, registry: Registry, sessions: Sessions, path: Path | None) -> None:
        self._registry, self._sessions = registry, sessions
        self._shared = None if path is None else CountsFile(path)
        self._writing = asyncio.Lock()  # so that what is written later was collected later
        self._seen: deque[tuple[float, Mapping[ProgramLabels, int]]] = deque(maxlen=RATE_OVER_S + 1)  # once a second

    async def __aenter__(self) -> Publisher:
        if self._shared is not None:
            await asyncio.to_thread(self._shared.open)
        self._seen.append((time.monotonic(), self._actions()))
        self._publishing = asyncio.create_task(self._publish())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._publishing.cancel()
        await self._write_if_it_can()

    async def families(self) -> Families:
        """Of all workers."""
        if self._shared is None:
            return self._collect()
        await self._write(self._shared)
        return await asyncio.to_thread(self._shared.read)

    async def _publish(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            self._seen.append((time.monotonic(), self._actions()))
            await self._write_if_it_can()

    async def _write_if_it_can(self) -> None:
        if self._shared is not None:
            try:
                await self._write(self._shared)
            except sqlite3.Error as error:
                log.warning("this worker's counts could not be written: %s", error)

    async def _write(self, shared: CountsFile) -> None:
        async with self._writing:
            await asyncio.to_thread(shared.write, self._collect())

    def _collect(self) -> Families:
        then_s, before = self._seen[0]
        passed_s = time.monotonic() - then_s
        done: Counter[str] = Counter()
        for program, n in self._actions().items():
            done[program.policy] += n - before.get(program, 0)
        return collect(self._registry, self._sessions, {policy: n / passed_s for policy, n in done.items()})

    def _actions(self) -> dict[ProgramLabels, int]:
        """So far."""
        return {program: meters.sizes.total for program, meters in self._registry.counts.programs.items()}
