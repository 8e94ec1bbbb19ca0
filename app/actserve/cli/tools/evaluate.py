"""Evaluates an artifact before it is published: each program plays games through HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from actserve.atari.evaluation import summarise
from actserve.atari.play import Report
from actserve.cli.tools import local_service, play_and_load
from actserve.core.environment import game_of
from actserve.store.artifact import Artifact

PROTOCOL = "machado"


def evaluate(artifact: Artifact, episodes: int, seed: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Play `episodes` games with each program of `artifact`; game i has the seed `seed + i`.

    Returns JSON for the certificate. Raises `UsageError` if the artifact plays no game, or if its environment breaks
    the protocol.
    """
    name = artifact.manifest.name
    store = artifact.folder.parent.parent
    reports: list[Report] = []
    for runtime in artifact.manifest.programs:
        progress(f"playing {episodes} games through HTTP on .{runtime}")
        with local_service.serve(store, "--runtime", runtime) as service:
            reports.append(
                play_and_load.play(
                    service.url,
                    name,
                    console=Console(quiet=True),
                    episodes=episodes,
                    seed=seed,
                    protocol=PROTOCOL,
                    on_game=lambda number, score: progress(f"  game {number + 1} of {episodes}: {score:+.0f}"),
                )
            )
    environment = game_of(artifact.manifest.environment)
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
