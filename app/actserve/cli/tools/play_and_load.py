"""The code of `actserve play` and `actserve load`: run games or a load test, and print the report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actserve.atari.emulator import AtariGame
from actserve.atari.evaluation import PROTOCOLS, compare, print_comparison, print_summary, summarise
from actserve.atari.film import Film
from actserve.atari.play import Act, Report
from actserve.atari.play import play as run_play
from actserve.client.remote_policy import RemotePolicy
from actserve.client.state_carriers import STATE_CARRIERS, EpisodeClient
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

    `via` is one of `STATE_CARRIERS`. The seed of a game also seeds the policy's randomness. The video at `video` shows
    every `speed`-th step. `on_game` gets each finished game's number, from 0, and its score. Raises `UsageError` if the
    policy plays no game, if it was trained on a game other than `game`, or if its environment breaks `protocol`.
    """
    with ExitStack() as stack:
        remote = stack.enter_context(RemotePolicy(url, policy, token=token))
        environment = remote.environment
        if environment is None:
            raise UsageError(
                f"{remote.name} plays no game, so there is nothing to watch. "
                "If it was trained on an Atari game, export it again with --game"
            )
        if game is not None and game != environment.game:
            raise UsageError(f"{remote.name} was trained on {environment.game}; got --game {game}")
        if protocol is not None:
            PROTOCOLS[protocol](environment)
        film = stack.enter_context(Film.of(video, remote, speed)) if video is not None else None
        status = stack.enter_context(console.status(f"{environment.id}: starting"))
        episodes_stack = stack.enter_context(ExitStack())
        episode: EpisodeClient | None = None

        def begin(seed: int) -> Act:
            nonlocal episode
            episodes_stack.close()  # ends the episode before
            outputs = film.outputs if film else ()
            started = STATE_CARRIERS[via](remote, outputs=outputs, exploration=exploration, seed=seed)
            episode = episodes_stack.enter_context(started)
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
    """The object that `play --json` prints: the report, and on request its evaluation and its comparison."""
    document = report.as_json()
    if evaluated:
        document["evaluation"] = summarise(report.scores, report.game).as_json()
    if other is not None:
        document["other"] = other.as_json()
        document["comparison"] = compare(report, other).as_json()
    return document


def print_report(report: Report, evaluated: bool, other: Report | None) -> None:
    """Print the report, its evaluation and its comparison as tables."""
    out = Console()
    for played in (report, other) if other is not None else (report,):
        table = Table(title=f"{played.policy} on .{played.runtime}")
        for heading in ("seed", "score", "steps"):
            table.add_column(heading, justify="right")
        for episode in played.episodes:
            table.add_row(str(episode.seed), f"{episode.score:+.0f}", f"{episode.steps:,}")
        out.print(table)
        if evaluated:
            print_summary(summarise(played.scores, played.game), out)
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
    """Run a load test. `via` is one of `BACKENDS`. Without a concurrency and a rate: `CONCURRENCY` connections."""
    if rate is None and concurrency is None:
        concurrency = CONCURRENCY
    title = f"{rate:g} requests/s" if rate is not None else f"{concurrency} connections"
    title += "" if via == "http" else f" via {via}"
    with console.status(f"{title} for {duration_s:g} s") as status:
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
                f"{title}  {elapsed_s:.0f} of {duration_s:g} s  {answers:,} answers"
            ),
        )


def print_load(report: LoadReport) -> None:
    """Print the report as text."""
    print(f"{report.requests:,} answers, {report.rate:,.0f} a second")
    print(_latency(report.latency_ms))
    for kind, count in report.errors.items():
        print(f"  {kind}: {count:,}")


def _latency(latency_ms: dict[str, float]) -> str:
    return "latency ms  " + "  ".join(f"{name} {value:.2f}" for name, value in latency_ms.items())
