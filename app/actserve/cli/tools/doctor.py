"""The code of `actserve doctor`: which programs of a store can this host run?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from actserve.core.errors import ActserveError
from actserve.engine.runtimes import preflight
from actserve.engine.runtimes.preflight import Host
from actserve.engine.runtimes.probe import probed_copy
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore

RUNS = "this host can run it"


@dataclass(frozen=True)
class ProgramStatus:
    """One program of one version. `runtime` None: the version itself cannot be read."""

    policy: str  # name@version
    runtime: str | None
    runs: bool
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    host: dict[str, Any]
    rows: list[ProgramStatus]

    def as_json(self) -> dict[str, Any]:
        return {"host": self.host, "programs": [asdict(row) for row in self.rows]}


def diagnose(
    store: ModelStore,
    name: str | None = None,
    host: Host | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Diagnosis:
    """Check every version of `name`, or of every policy, the newest first. Raises `UnknownPolicy`.

    Hashes the files. Loads a `.pt2` in a separate process, if nothing in its manifest rules it out.
    """
    host = host or preflight.this_host()
    rows: list[ProgramStatus] = []
    for policy in [name] if name is not None else store.names():
        for version in reversed(store.versions(policy)):
            progress(f"{policy}@{version}")
            rows += _examine(store, policy, version, host)
    return Diagnosis(host.facts(), rows)


def _examine(store: ModelStore, name: str, version: int, host: Host) -> list[ProgramStatus]:
    label = f"{name}@{version}"
    try:
        artifact = store.resolve(name, version)
    except ActserveError as error:
        return [ProgramStatus(label, None, False, error.message)]
    found = {runtime: _objection(runtime, artifact, host) for runtime in sorted(artifact.manifest.programs)}
    return [ProgramStatus(label, runtime, reason is None, reason or RUNS) for runtime, reason in found.items()]


def _objection(runtime: str, artifact: Artifact, host: Host) -> str | None:
    if (reason := preflight.refusal(runtime, artifact.manifest, host)) is not None:
        return reason
    try:
        if runtime == "pt2":
            with probed_copy(artifact):
                return None
        artifact.read_program(runtime)
    except ActserveError as error:
        return error.message.removeprefix(f"{artifact.label}: ")
    return None


def print_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    console = console or Console()
    host = diagnosis.host
    packages = ", ".join(f"{name} {version}" for name, version in host["packages"].items()) or "no engine"
    devices = ", ".join(host["devices"])
    if host["compute_capability"]:
        devices += f" (compute capability {host['compute_capability']})"
    console.print(
        f"this host: {host['platform']}, glibc {host['glibc'] or 'none'}, GLIBCXX {host['glibcxx'] or 'none'}; "
        f"{packages}; {devices}",
        highlight=False,
    )
    table = Table()
    table.add_column("program", no_wrap=True)
    table.add_column("runs", no_wrap=True)
    table.add_column("why")
    for row in diagnosis.rows:
        verdict = "[green]yes[/]" if row.runs else "[red]no[/]"
        table.add_row(f"{row.policy} .{row.runtime}" if row.runtime else row.policy, verdict, row.reason)
    console.print(table)
