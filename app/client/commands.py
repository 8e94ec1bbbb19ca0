"""What `actserve play` and `actserve load` do: connect, run, show."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.client.ale import AtariGame
from app.client.load import LoadReport
from app.client.load import load as run_load
from app.client.play import Report
from app.client.play import play as run_play
from app.client.remote import RemotePolicy
from app.client.video import VideoWriter
from app.errors import UsageError

EMULATOR_FPS = 60


def play(
    url: str, policy: str | None, game: str | None, episodes: int, seed: int, video: Path | None, console: Console
) -> Report:
    """Play whole games through a service, with a live line on `console`."""
    with ExitStack() as stack:
        remote = stack.enter_context(RemotePolicy(url, policy))
        environment = remote.environment
        if environment is None:
            raise UsageError(f"{remote.name} plays no game; it can be called, not watched")
        if game is not None and game != environment.game:
            raise UsageError(f"{remote.name} was trained for {environment.game}, not for {game}")
        writer = None
        if video is not None:
            writer = stack.enter_context(VideoWriter(video, fps=EMULATOR_FPS / environment.frame_skip))
        status = stack.enter_context(console.status(f"{environment.id}: starting"))

        def show(number: int, game: AtariGame) -> None:
            if writer is not None:
                writer.add(game.screen())
            if game.steps % 20 == 0:
                status.update(f"game {number + 1} of {episodes}  score {game.score:+.0f}  step {game.steps:,}")

        return run_play(
            remote.act,
            environment,
            episodes=episodes,
            seed=seed,
            policy=remote.name,
            runtime=remote.runtime,
            on_step=show,
        )


def print_report(report: Report) -> None:
    table = Table(title=f"{report.policy} on .{report.runtime}")
    for heading in ("seed", "score", "steps"):
        table.add_column(heading, justify="right")
    for episode in report.episodes:
        table.add_row(str(episode.seed), f"{episode.score:+.0f}", f"{episode.steps:,}")
    Console().print(table)
    print(f"mean score {sum(report.scores) / len(report.scores):+.1f}")
    print(_latency(report.latency_ms))


def load(
    url: str,
    policy: str | None,
    concurrency: int | None,
    rate: float | None,
    duration_s: float,
    processes: int | None,
    console: Console,
) -> LoadReport:
    """Load a service for a while; closed loop with 8 connections unless told otherwise."""
    if rate is None and concurrency is None:
        concurrency = 8
    what = f"{rate:g} requests/s" if rate is not None else f"{concurrency} connections"
    with console.status(f"{what} for {duration_s:g} s") as status:
        return run_load(
            url,
            policy=policy,
            concurrency=concurrency,
            rate=rate,
            duration_s=duration_s,
            processes=processes,
            on_progress=lambda elapsed_s, answers: status.update(
                f"{what}  {elapsed_s:.0f} of {duration_s:g} s  {answers:,} answers"
            ),
        )


def print_load(report: LoadReport) -> None:
    print(f"{report.requests:,} answers, {report.rate:,.0f} a second")
    print(_latency(report.latency_ms))
    for kind, count in report.errors.items():
        print(f"  {kind}: {count:,}")


def _latency(latency_ms: dict[str, float]) -> str:
    return "latency ms  " + "  ".join(f"{name} {value:.2f}" for name, value in latency_ms.items())
