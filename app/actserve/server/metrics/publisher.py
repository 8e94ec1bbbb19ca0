"""Publisher: shares counts between workers, so that each worker can report the metrics of the whole service."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path

from actserve.core.errors import MetricsUnavailable
from actserve.core.repeat import repeat
from actserve.engine.registry import Registry
from actserve.recording.recorder import Recorder
from actserve.server.memory import Memory
from actserve.server.metrics.collect import collect
from actserve.server.sessions import Sessions
from actserve.telemetry.counts import ProgramLabels
from actserve.telemetry.counts_file import CountsFile
from actserve.telemetry.families import Families
from actserve.telemetry.loop_lag import LoopLag

log = logging.getLogger("actserve")

EVERY_S = 1.0
RATE_OVER_S = 10


class Publisher:
    """The publisher of one worker. Enter it before the first request, and exit it after the last.

    All workers share the file at `path`; None if there is only one worker.
    """

    def __init__(
        self,
        registry: Registry,
        sessions: Sessions,
        memory: Memory,
        path: Path | None,
        recorder: Recorder | None = None,
    ) -> None:
        self._registry, self._sessions, self._memory = registry, sessions, memory
        self._recorder = recorder
        self._shared = None if path is None else CountsFile(path)
        self._lag = LoopLag()
        self._writing = asyncio.Lock()  # keeps writes in the order of collection
        self._history: deque[tuple[float, Mapping[ProgramLabels, int]]] = deque(maxlen=RATE_OVER_S + 1)  # each second

    async def __aenter__(self) -> Publisher:
        if self._shared is not None:
            await asyncio.to_thread(self._shared.open)
        self._history.append((time.monotonic(), self._actions()))
        await self._lag.__aenter__()
        self._publishing = asyncio.create_task(repeat(EVERY_S, self._publish, "publishing the counts"))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._publishing.cancel()
        await self._lag.__aexit__()
        await self._try_to_write()

    async def families(self) -> Families:
        """The metrics of all workers. Raises `MetricsUnavailable`."""
        if self._shared is None:
            return self._collect()
        try:
            await self._write(self._shared)
            return await asyncio.to_thread(self._shared.read)
        except sqlite3.Error as error:  # those of this worker alone would be less than at the last scrape
            raise MetricsUnavailable(f"the counts of the workers cannot be read: {error}; try again shortly") from error

    async def _publish(self) -> None:
        self._history.append((time.monotonic(), self._actions()))
        await self._try_to_write()

    async def _try_to_write(self) -> None:
        if self._shared is not None:
            try:
                await self._write(self._shared)
            except sqlite3.Error as error:
                log.warning("this worker's counts could not be written: %s", error)

    async def _write(self, shared: CountsFile) -> None:
        async with self._writing:
            await asyncio.to_thread(shared.write, self._collect())

    def _collect(self) -> Families:
        then_s, before = self._history[0]
        elapsed_s = time.monotonic() - then_s
        actions: Counter[str] = Counter()
        for program, total in self._actions().items():
            actions[program.policy] += total - before.get(program, 0)
        rates = {policy: n / elapsed_s for policy, n in actions.items()}
        return collect(self._registry, self._sessions, rates, self._lag, self._memory, self._recorder)

    def _actions(self) -> dict[ProgramLabels, int]:
        """The number of actions so far, by program."""
        return {program: meters.sizes.total for program, meters in self._registry.counts.programs.items()}
