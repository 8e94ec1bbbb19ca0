"""What `actserve play` and `actserve load` do: connect, run, show."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actserve.atari.emulator import AtariGame
from actserve.atari.evaluation import PROTOCOLS, compare, evaluate, print_comparison, print_summary
from actserve.atari.film import Film
from actserve.atari.play import Act, Report
from actserve.atari.play import play as run_play
from actserve.client.remote_policy import RemotePolicy
from actserve.client.via import WAYS, Acting
from actserve.core.errors import UsageError
from actserve.core.signature import Exploration
from actserve.loadtest.generator import CONCURRENCY, LoadReport
from actserve.loadtest.generator import load as run_load


def play(
    url: str,
    policy: str | None,
    *,
    console: Console,
    game: str | None = None,
    episodes: int = 1,
    seed: int = 0,
    video: Path | None = None,
    speed: int = 1,
    protocol: str | None = None,
    via: str = "http",
    exploration: Exploration | None = None,
    max_steps: int | None = None,
    token: str | None = None,
    on_game: Callable[[int, float], None] = lambda number, score: None,
) -> Report:
    """Play whole games through a service, with a live line on `console`.

    `via`, one of `WAYS`, is how an episode's state is kept; what is random in it comes from the game's seed. `video`
    gets every `speed`-th step; `on_game` each game's number, from 0, and its score. Raises `UsageError` if the
    policy plays no game, another one than `game`, or not by `protocol`.
    """
    with ExitStack() as stack:
        remote = stack.enter_context(RemotePolicy(url, policy, token=token))
        environment = remote.environment
        if environment is None:
            raise UsageError(
                f"{remote.name} plays no game; it can be called, not watched. "
                "A policy that was made for a game is exported with --game"
            )
        if game is not None and game != environment.game:
            raise UsageError(f"{remote.name} was trained for {environment.game}, not for {game}")
        if protocol is not None:
            PROTOCOLS[protocol](environment)
        film = stack.enter_context(Film(video, remote, speed)) if video is not None else None
        status = stack.enter_context(console.status(f"{environment.id}: starting"))
        acting = stack.enter_context(ExitStack())
        episode: Acting | None = None

        def begin(seed: int) -> Act:
            nonlocal episode
            acting.close()
            outputs = film.outputs if film else ()
            episode = acting.enter_context(WAYS[via](remote, outputs, exploration, seed))
            return episode.act

        def show(number: int, game: AtariGame, action: int) -> None:
            if film is not None and episode is not None:
                film.add(game, action, episode.outputs)
            if game.over:
                on_game(number, game.score)
            if game.steps % 20 == 0:
                status.update(f"game {number + 1} of {episodes}  score {game.score:+.0f}  step {game.steps:,}")

        return run_play(
            begin,
            environment,
            episodes=episodes,
            seed=seed,
            policy=remote.name,
            runtime=remote.runtime,
            max_steps=max_steps,
            on_step=show,
        )


def report_as_json(report: Report, evaluated: bool, other: Report | None) -> dict[str, Any]:
    """The object that `play --json` prints: the report, and if asked for, its evaluation and its comparison."""
    document = report.as_json()
    if evaluated:
        document["evaluation"] = evaluate(report.scores, report.game).as_json()
    if other is not None:
        document["other"] = other.as_json()
        document["comparison"] = compare(report, other).as_json()
    return document


def print_report(report: Report, evaluated: bool, other: Report | None) -> None:
    """The same as tables."""
    out = Console()
    for played in (report, other) if other is not None else (report,):
        table = Table(title=f"{played.policy} on .{played.runtime}")
        for heading in ("seed", "score", "steps"):
            table.add_column(heading, justify="right")
        for episode in played.episodes:
            table.add_row(str(episode.seed), f"{episode.score:+.0f}", f"{episode.steps:,}")
        out.print(table)
        if evaluated:
            print_summary(evaluate(played.scores, played.game), out)
        else:
            print(f"mean score {sum(played.scores) / len(played.scores):+.1f}")
        print(_latency(played.latency_ms))
    if other is not None:
        print_comparison(compare(report, other), out)


def load(
    url: str,
    policy: str | None,
    concurrency: int | None,
    rate: float | None,
    duration_s: float,
    processes: int | None,
    console: Console,
    via: str = "http",
    token: str | None = None,
) -> LoadReport:
    """Load a service for a while, `via` one of `BACKENDS`; with neither, a closed loop of `CONCURRENCY` connections."""
    if rate is None and concurrency is None:
        concurrency = CONCURRENCY
    what = f"{rate:g} requests/s" if rate is not None else f"{concurrency} connections"
    what += "" if via == "http" else f" via {via}"
    with console.status(f"{what} for {duration_s:g} s") as status:
        return run_load(
            url,
            policy=policy,
            via=via,
            concurrency=concurrency,
            rate=rate,
            duration_s=duration_s,
            processes=processes,
            token=token,
            on_progress=lambda elapsed_s, answers: status.update(
                f"{what}  {elapsed_s:.0f} of {duration_s:g} s  {answers:,} answers"
            ),
        )


def print_load(report: LoadReport) -> None:
    """The report for people."""
    print(f"{report.requests:,} answers, {report.rate:,.0f} a second")
    print(_latency(report.latency_ms))
    for kind, count in report.errors.items():
        print(f"  {kind}: {count:,}")


def _latency(latency_ms: dict[str, float]) -> str:
    return "latency ms  " + "  ".join(f"{name} {value:.2f}" for name, value in latency_ms.items())
