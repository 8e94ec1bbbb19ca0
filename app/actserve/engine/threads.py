"""Threads: how many a call takes.

A quick program has one thread: waking others costs more than they save. A slow one is loaded with one thread and with
all cores, if that makes its calls shorter. A call takes all cores only if no other slow call of the service runs when
it begins. So a lone client has all cores; under load every worker has one thread, which wastes none of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from actserve.core.errors import RuntimeFailure
from actserve.core.settings import Settings
from actserve.core.signature import Array, Arrays
from actserve.engine import golden
from actserve.engine.calls import Calls
from actserve.engine.cores import usable_cores
from actserve.engine.runtimes.base import Runtime
from actserve.engine.tuning import Tuning, measure, measure_wide
from actserve.store.artifact import Artifact

log = logging.getLogger("actserve")

QUIET_S = 5.0  # a measurement waits so long for the other slow calls of the service to end
CALLS = "calls.lock"


class ElasticRuntime:
    """One program with one thread (`narrow`) and with all cores (`wide`).

    A call of at least `wide_from` items is wide if it is the only one of `calls` when it begins.
    """

    def __init__(self, narrow: Runtime, wide: Runtime, wide_from: int, calls: Calls) -> None:
        self._narrow = narrow
        self._wide = wide
        self._wide_from = wide_from
        self._calls = calls

    def run(self, batch: Mapping[str, Array]) -> Arrays:
        """As `Runtime.run`."""
        size = len(next(iter(batch.values())))
        with self._calls.enter() as alone:
            return (self._wide if alone and size >= self._wide_from else self._narrow).run(batch)

    def close(self) -> None:
        self._wide.close()
        self._narrow.close()
        self._calls.close()


def load(
    name: str, artifact: Artifact, settings: Settings, tuning: Tuning | None
) -> tuple[Runtime | ElasticRuntime, Tuning]:
    """Load the program for the runtime of this name, checked with the golden samples, and measure it.

    `tuning` is an earlier measurement on this host. Raises `StoreError` or `RuntimeFailure`.
    """
    shared = settings.shared
    with Calls(shared and shared / CALLS) as calls:
        with calls.enter():  # counts as running: no worker measures all cores while another one loads
            runtime = golden.load(name, artifact, settings.threads or 1, shared)
            tuning = tuning or measure(runtime.run, runtime.signature)
            cores = usable_cores()
            if settings.threads is not None or tuning.quick or cores == 1:
                return runtime, tuning
            try:
                wide = runtime.with_threads(cores)
            except RuntimeFailure as error:
                log.warning("%s", error.message)
                return runtime, tuning
            if wide is runtime:
                return runtime, tuning
        if tuning.threads != cores:
            program = artifact.manifest.programs[name].file
            found = shared and shared / f"{artifact.manifest.files[program].sha256}.tuning.json"
            tuning = _measure_once(found, calls, tuning, runtime, wide, cores)
        return _choose(name, artifact, tuning, runtime, wide, shared), tuning


def _measure_once(
    file: Path | None, calls: Calls, tuning: Tuning, narrow: Runtime, wide: Runtime, cores: int
) -> Tuning:
    """Measure both, or take the result of another worker from `file`. No worker measures while another one does."""
    with calls.exclude(QUIET_S) as quiet:
        if file is not None and (found := _read(file, cores)) is not None:
            return found
        tuning = measure_wide(tuning, narrow.run, wide.run, cores, narrow.signature)
        if file is not None and quiet:
            with suppress(OSError):  # then the next worker measures
                file.write_text(json.dumps({"item_ns": tuning.item_ns, "wide_ns": tuning.wide_ns}))
    return tuning


def _read(file: Path, cores: int) -> Tuning | None:
    try:
        saved = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    item_ns, wide_ns = ({int(size): ns for size, ns in saved[name].items()} for name in ("item_ns", "wide_ns"))
    return Tuning(item_ns, cores, wide_ns)


def _choose(
    name: str, artifact: Artifact, tuning: Tuning, narrow: Runtime, wide: Runtime, shared: Path | None
) -> Runtime | ElasticRuntime:
    wide_from = None if tuning.quick else tuning.wide_from
    if wide_from is not None:
        try:
            golden.prove(wide, name, artifact)
        except RuntimeFailure as error:
            log.warning("%s; it has one thread", error.message)
            wide_from = None
    if wide_from is None:
        wide.close()
        return narrow
    before_ms, after_ms = (wide_from * times[wide_from] / 1e6 for times in (tuning.item_ns, tuning.wide_ns))
    log.info(
        "%s: a call takes %d threads while no other slow call runs (%.1f ms instead of %.1f)",
        artifact.label, tuning.threads, after_ms, before_ms,
    )  # fmt: skip
    return ElasticRuntime(narrow, wide, wide_from, Calls(shared and shared / CALLS))
