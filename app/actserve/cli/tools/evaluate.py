"""The games that an artifact plays before it is published: through HTTP, on every runtime, by a protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from actserve.atari.evaluation import evaluate as summarise
from actserve.atari.play import Report
from actserve.cli.tools import local_service as local
from actserve.cli.tools import play_and_load as commands
from actserve.store.artifact import Artifact

PROTOCOL = "machado"


def evaluate(artifact: Artifact, episodes: int, seed: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """`episodes` games with each program of `artifact`, the i-th seeded `seed + i`; JSON-able, for the certificate.

    Raises `UsageError` if the artifact plays no game, or not by the protocol.
    """
    name = artifact.manifest.name
    store = artifact.folder.parent.parent
    reports: list[Report] = []
    for runtime in artifact.manifest.programs:
        progress(f"playing {episodes} games through HTTP on .{runtime}")
        with local.serve(store, "--runtime", runtime) as service:
            reports.append(
                commands.play(
                    service.url,
                    name,
                    console=Console(quiet=True),
                    episodes=episodes,
                    seed=seed,
                    protocol=PROTOCOL,
                    on_game=lambda number, score: progress(f"  game {number + 1} of {episodes}: {score:+.0f}"),
                )
            )
    environment = artifact.manifest.environment
    assert environment is not None
    return {
        "protocol": PROTOCOL,
        "command": f"actserve play --policy {name} --protocol {PROTOCOL} --episodes {episodes} --seed {seed}",
        "programs": {
            report.runtime: {"scores": report.scores, **summarise(report.scores, environment.game).as_json()}
            for report in reports
        },
        "same_games": len({report.episodes for report in reports}) == 1,  # action for action
    }
