"""`actserve play` and `load`: to use a service, and to see what it can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from actserve.cli.terminal import Json, console, print_json
from actserve.core.errors import UsageError

DEFAULT_URL = "http://127.0.0.1:8000"

Protocol = Literal["machado"]
Way = Literal["http", "session", "stream", "oip"]
Exploring = Literal["deterministic", "random"]
Url = Annotated[str, typer.Option(help="The service.", envvar="ACTSERVE_URL")]
PolicyOption = Annotated[str | None, typer.Option(help="The policy's name; by default the service's default.")]
TokenOption = Annotated[
    str | None,
    typer.Option(envvar="ACTSERVE_TOKEN", help="What the service lets in with. Better set by the variable."),
]


def play(
    url: Url = DEFAULT_URL,
    policy: PolicyOption = None,
    game: Annotated[str | None, typer.Option(help="The game; must be the one that the policy was trained for.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="How many games.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first game; the next ones count up.")] = 0,
    video: Annotated[Path | None, typer.Option(help="Write the games to this .mp4 or .gif.")] = None,
    speed: Annotated[int, typer.Option(min=1, help="Film every n-th step only.")] = 1,
    via: Annotated[
        Way, typer.Option(help="Where the state is: carried here, in a session, a stream, an OIP sequence.")
    ] = "http",
    exploration: Annotated[
        Exploring | None, typer.Option(help="Act as trained or as while training; by default as it can.")
    ] = None,
    protocol: Annotated[
        Protocol | None,
        typer.Option(help="Evaluate by this protocol: Machado et al. 2018, Agarwal et al. 2021."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="NAME|URL", help="Play the same seeds with this policy, or this service.")
    ] = None,
    token: TokenOption = None,
    json: Json = False,
) -> None:
    """Play Atari games on this machine with a policy served over HTTP."""
    from actserve.cli.tools import play_and_load as commands

    def games(url: str, policy: str | None, video: Path | None) -> Any:
        return commands.play(
            url, policy, console=console(), game=game, episodes=episodes, seed=seed, video=video, speed=speed,
            protocol=protocol, via=via, exploration=exploration, token=token,
        )  # fmt: skip

    report = games(url, policy, video)
    if video is not None:
        console().print(f"wrote {video}", highlight=False)
    other = None
    if compare is not None:
        other = games(compare, policy, None) if "://" in compare else games(url, compare, None)
    if json:
        print_json(commands.report_as_json(report, protocol is not None, other))
    else:
        commands.print_report(report, protocol is not None, other)


def load(
    url: Url = DEFAULT_URL,
    policy: PolicyOption = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Closed loop: this many connections.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Open loop: this many requests a second.")] = None,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds.")] = 10.0,
    via: Annotated[
        Way, typer.Option(help="How to ask: single requests, or each connection a session, a stream, an OIP sequence.")
    ] = "http",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Load processes; by default as many as it takes.")
    ] = None,
    token: TokenOption = None,
    json: Json = False,
) -> None:
    """Load a service and report rate, latency and errors."""
    from actserve.cli.tools import play_and_load as commands

    if concurrency is not None and rate is not None:
        raise UsageError("--concurrency (closed loop) and --rate (open loop) exclude each other")
    report = commands.load(url, policy, concurrency, rate, duration, processes, console(), via, token)
    if json:
        print_json(report.as_json())
    else:
        commands.print_load(report)
