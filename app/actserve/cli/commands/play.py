"""`actserve play` and `load`: play games through a service, and measure it under load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from actserve.cli.terminal import Json, console, print_json
from actserve.core.errors import UsageError

DEFAULT_URL = "http://127.0.0.1:8000"

Protocol = Literal["machado"]
Via = Literal["http", "session", "stream", "oip"]
ExplorationMode = Literal["deterministic", "random"]
Url = Annotated[str, typer.Option(help="Address of the service.", envvar="ACTSERVE_URL")]
PolicyOption = Annotated[str | None, typer.Option(help="Name of the policy; default: the service's default policy.")]
TokenOption = Annotated[
    str | None,
    typer.Option(
        envvar="ACTSERVE_TOKEN", help="Token for a service that requires one. Prefer the environment variable."
    ),
]


def play(
    url: Url = DEFAULT_URL,
    policy: PolicyOption = None,
    game: Annotated[
        str | None, typer.Option(help="Expected game, such as pong; fails if the policy was trained on another.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Number of games.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first game; game i has SEED + i.")] = 0,
    video: Annotated[Path | None, typer.Option(help="Write a video of the games to this .mp4 or .gif file.")] = None,
    speed: Annotated[int, typer.Option(min=1, help="Show every n-th step in the video; 1 shows all.")] = 1,
    via: Annotated[
        Via,
        typer.Option(
            help="Where the policy's state is kept: http in this client, else in a session, stream or OIP sequence."
        ),
    ] = "http",
    exploration: Annotated[
        ExplorationMode | None,
        typer.Option(
            help="deterministic: the best action; random: sample as in training. Default: the policy's first mode."
        ),
    ] = None,
    protocol: Annotated[
        Protocol | None,
        typer.Option(
            help="Check the environment against this protocol and print mean, IQM and intervals. Default: neither."
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|URL",
            help="Also play the same seeds with another policy of the service, or with another service, and compare.",
        ),
    ] = None,
    token: TokenOption = None,
    json: Json = False,
) -> None:
    """Play Atari games on this machine; a service chooses the actions."""
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
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: number of connections. Default: 8, unless --rate is given.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Open loop: requests per second.")] = None,
    duration: Annotated[float, typer.Option(min=0.1, help="Duration of the test in seconds.")] = 10.0,
    via: Annotated[
        Via,
        typer.Option(help="http: independent requests; else each connection is a session, stream or OIP sequence."),
    ] = "http",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Number of load processes; default: 1, or one per core if 1 is too slow.")
    ] = None,
    token: TokenOption = None,
    json: Json = False,
) -> None:
    """Send load to a service and report the rate, latency and errors."""
    from actserve.cli.tools import play_and_load as commands

    if concurrency is not None and rate is not None:
        raise UsageError("--concurrency (closed loop) and --rate (open loop) exclude each other; give one of them")
    report = commands.load(url, policy, concurrency, rate, duration, processes, console(), via, token)
    if json:
        print_json(report.as_json())
    else:
        commands.print_load(report)
