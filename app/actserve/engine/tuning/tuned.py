"""Tuned: the result of `actserve tune` for one artifact on one host, in a file beside the version's folder.

It holds the measured times of each certified program, from which the service takes the fastest program and the batch
size. If the file is missing, unreadable or of another host, the service measures when it loads the policy.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from actserve.core.errors import ActserveError, RuntimeRefused
from actserve.engine import golden
from actserve.engine.cores import usable_cores
from actserve.engine.runtimes import preflight
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.host import cpu_model, this_host
from actserve.engine.tuning import Tuning, measure, measure_wide
from actserve.store.artifact import Artifact

FILE = "tuning"  # beside the artifact
LIMIT_BYTES = 1 << 16
BRIEFLY_NS = 50_000_000  # measuring time per batch size


@dataclass(frozen=True)
class Tuned:
    """The measured times of all programs that this host can run, by runtime."""

    programs: Mapping[str, Tuning]

    @staticmethod
    def measure(artifact: Artifact, min_ns: int) -> tuple[Tuned, dict[str, str]]:
        """Run every program for `min_ns` per batch size. Also returns the errors of failed programs, by runtime.

        Raises `RuntimeRefused` if no program runs on this host.
        """
        programs: dict[str, Tuning] = {}
        failed: dict[str, str] = {}
        for name in sorted(artifact.manifest.programs):
            try:
                preflight.choose(name, artifact.manifest, this_host(), {})
                runtime = golden.load(name, artifact, threads=1)
            except ActserveError as error:
                failed[name] = error.message
                continue
            try:
                programs[name] = _with_threads(runtime, measure(runtime.run, runtime.signature, min_ns))
            finally:
                runtime.close()
        if not programs:
            raise RuntimeRefused(f"{artifact.label} cannot run here: {'; '.join(failed.values())}")
        return Tuned(programs), failed

    @property
    def fastest(self) -> str:
        """With one thread each, which is the cost under load."""
        return min(self.programs, key=lambda runtime: self.programs[runtime].best_ns)

    def save(self, artifact: Artifact) -> Path:
        """Write the file atomically. Raises `StoreError`."""
        document = {
            "of": _programs(artifact),
            "host": _host(),
            "item_ns": {runtime: tuning.item_ns for runtime, tuning in self.programs.items()},
            "wide": {
                runtime: {"threads": tuning.threads, "item_ns": tuning.wide_ns}
                for runtime, tuning in self.programs.items()
                if tuning.wide_ns
            },
        }
        return artifact.write_beside(FILE, document)

    @staticmethod
    def load(artifact: Artifact) -> Tuned | None:
        """The saved result for exactly these files and this kind of host, or None."""
        try:
            with artifact.beside(FILE).open("rb") as file:
                document = from_json(file.read(LIMIT_BYTES))
            if (document["of"], document["host"]) != (_programs(artifact), _host()):
                return None
            wide = document.get("wide", {})  # older files have none
            found = {
                runtime: Tuning(_times(item_ns), *_wide(wide.get(runtime)))
                for runtime, item_ns in document["item_ns"].items()
                if runtime in artifact.manifest.programs
            }
            usable = found and all(_is_complete(tuning) for tuning in found.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return Tuned(found) if usable else None


def _with_threads(runtime: Runtime, tuning: Tuning) -> Tuning:
    """`tuning`, with the times of a slow program with all cores."""
    cores = usable_cores()
    if tuning.quick or cores == 1:
        return tuning
    wide = runtime.with_threads(cores)
    if wide is runtime:
        return tuning
    try:
        return measure_wide(tuning, runtime.run, wide.run, cores, runtime.signature)
    finally:
        wide.close()


def _times(by_size: Mapping[str, int]) -> dict[int, int]:
    return {int(size): int(ns) for size, ns in by_size.items()}


def _wide(saved: Any) -> tuple[int, dict[int, int]]:
    """(threads, times). Times with another number of threads than this process can use are left out."""
    if saved is None or saved["threads"] != usable_cores():
        return 1, {}
    return int(saved["threads"]), _times(saved["item_ns"])


def _is_complete(tuning: Tuning) -> bool:
    times = [*tuning.item_ns.values(), *tuning.wide_ns.values()]
    return 1 in tuning.item_ns and min(times) > 0 and tuning.wide_ns.keys() <= tuning.item_ns.keys()


def tune_briefly(artifact: Artifact, progress: Callable[[str], None]) -> None:
    """Measure the artifact's programs at the end of an export, so that `auto` picks the fastest."""
    if artifact.manifest.programs:
        progress(
            "measuring which program is the fastest here"
            if len(artifact.manifest.programs) > 1
            else "measuring which batches are the fastest here"
        )
        tuned, _ = Tuned.measure(artifact, BRIEFLY_NS)
        tuned.save(artifact)


def _programs(artifact: Artifact) -> dict[str, str]:
    manifest = artifact.manifest
    return {runtime: manifest.files[program.file].sha256 for runtime, program in sorted(manifest.programs.items())}


@cache
def _host() -> dict[str, object]:
    """The properties of the host that the measured times depend on."""
    return {
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": dict(sorted(this_host().packages.items())),
    }
