"""The tutorial's comparison, and more: TorchRL, .pt2 and .onnx play the same game, in process and through HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from actserve.atari.play import Report, play
from actserve.cli.tools import local_service
from actserve.client.remote_policy import RemotePolicy
from actserve.core.environment import game_of
from actserve.core.errors import UsageError
from actserve.core.signature import Array
from actserve.engine.runtimes import preflight
from actserve.engine.runtimes.load import load
from actserve.store.artifact import Artifact
from actserve_export.targets import actor

Act = Callable[[Array], int]


@dataclass(frozen=True)
class Measurement:
    """The steps of the game with one way of running the policy. Times are wall time on one thread."""

    way: str
    total_ms: float  # includes the game's own time, as in the tutorial
    act_us: float  # median time of one action
    actions_sha256: str  # equal for two ways that played the same game

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run(artifact: Artifact, store: str, steps: int, console: Console) -> list[Measurement]:
    """Measure every program that this host can run. Raises `UsageError` if the artifact plays no game."""
    manifest = artifact.manifest
    if manifest.environment is None:
        raise UsageError(f"{artifact.label} plays no game; expected an artifact with an environment")
    runtimes = [name for name in ("pt2", "onnx") if not preflight.refusal(name, manifest, preflight.this_host())]
    rows: list[Measurement] = []
    with console.status("TorchRL") as status:
        eager: Act = actor(manifest.provenance["origin"])
        rows.append(_measure("TorchRL", eager, artifact, steps))
        for name in runtimes:
            status.update(f".{name}")
            rows.append(_measure(f".{name}", _in_process(name, artifact), artifact, steps))
        for name in runtimes:
            status.update(f".{name} through HTTP")
            with (
                local_service.serve(store, "--runtime", name) as service,
                RemotePolicy(service.url, manifest.name) as remote,
            ):
                rows.append(_measure(f".{name} through HTTP", remote.act, artifact, steps))
    return rows


def _in_process(name: str, artifact: Artifact) -> Act:
    runtime = load(name, artifact)
    observation, action = runtime.signature.observations[0].name, runtime.signature.action.name
    return lambda screen: int(runtime.run({observation: screen[None]})[action][0])


def _measure(way: str, act: Act, artifact: Artifact, steps: int) -> Measurement:
    assert artifact.manifest.environment is not None
    _play(act, artifact, 20)  # warm-up
    started = time.perf_counter()
    report = _play(act, artifact, steps)
    total_ms = (time.perf_counter() - started) * 1000
    return Measurement(way, total_ms, report.latency_ms["p50"] * 1000, report.episodes[0].actions_sha256)


def _play(act: Act, artifact: Artifact, steps: int) -> Report:
    game = game_of(artifact.manifest.environment)
    assert game is not None
    return play(lambda _seed: act, game, episodes=1, seed=0, max_steps=steps)


def print_rows(rows: list[Measurement]) -> None:
    reference = rows[0]
    table = Table(title="the same game, one thread")
    for heading in ("", "total ms", "µs per action", "times faster than TorchRL", "same actions"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        same = "yes" if row.actions_sha256 == reference.actions_sha256 else "NO"
        speed = f"{reference.total_ms / row.total_ms:.2f}"
        table.add_row(row.way, f"{row.total_ms:.0f}", f"{row.act_us:.0f}", speed, same)
    Console().print(table)
