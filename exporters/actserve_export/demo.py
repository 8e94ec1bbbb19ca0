"""`make demo`: export the bundled policy, serve it with each runtime, and play one whole game with each."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from actserve.atari.play import Report
from actserve.cli.tools import local_service
from actserve.cli.tools import play_and_load as playing
from actserve.core.errors import ActserveError
from actserve.engine.tuning.tuned import tune_briefly
from actserve.store.local import ModelStore
from actserve_export.publish import export
from actserve_export.targets import load

STORE = Path("models_store")
POLICY = "pong"


def main() -> None:
    """Print scores, latencies and the next commands."""
    console = Console()

    def say(line: str) -> None:
        console.print(f"   {line}")

    console.rule(f"1. export {POLICY} to .onnx and .pt2, and prove that they act the same")
    _, source = load(POLICY)
    done = export(source, POLICY, ModelStore(STORE), origin=POLICY, progress=say)
    tune_briefly(done.artifact, say)
    certificate = done.artifact.manifest.certificate
    for runtime, found in certificate["programs"].items():
        difference = max(found["largest_difference"].values())
        say(
            f".{runtime}: {found['compared']:,} real screens, {found['action_disagreements']} actions differ, "
            f"action values by at most {difference:.1g}"
        )
    console.rule("2. serve it, and play a game of Pong over HTTP")
    consoles = itertools.chain([console], itertools.repeat(Console(quiet=True)))  # a terminal shows one game
    with ThreadPoolExecutor() as games:
        reports = list(games.map(_play, certificate["programs"], consoles))
    _print(reports, console)
    console.rule("3. your turn")
    say(".venv/bin/actserve serve      then watch it: http://127.0.0.1:8000")
    say(".venv/bin/actserve play --video pong.mp4")


def _play(runtime: str, console: Console) -> Report:
    with local_service.serve(STORE, "--runtime", runtime) as service:
        return playing.play(service.url, POLICY, console=console)


def _print(reports: list[Report], console: Console) -> None:
    table = Table()
    for heading in ("runtime", "score", "steps", "p50 ms", "p99 ms", "actions"):
        table.add_column(heading, justify="right")
    for report in reports:
        (episode,) = report.episodes
        latency = report.latency_ms
        table.add_row(
            f".{report.runtime}",
            f"{episode.score:+.0f}",
            f"{episode.steps:,}",
            f"{latency['p50']:.2f}",
            f"{latency['p99']:.2f}",
            episode.actions_sha256[:12],
        )
    console.print(table)
    if len({report.episodes[0].actions_sha256 for report in reports}) == 1:
        console.print("   both runtimes played the same game, action for action")


if __name__ == "__main__":
    try:
        main()
    except ActserveError as error:
        sys.exit(f"error: {error.message}")
