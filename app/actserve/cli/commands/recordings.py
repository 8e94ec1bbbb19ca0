"""`actserve replay` and `actserve record`: what a service recorded with `serve --record`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from actserve.cli.plugins import Extended
from actserve.cli.stores import DEFAULT_STORE, Store, find, open_for_reading
from actserve.cli.terminal import Json, console, print_json
from actserve.core.errors import UsageError
from actserve.core.imports import import_extra

if TYPE_CHECKING:
    from actserve.cli.tools.replay import Replayed
    from actserve.recording.reader import Recording, Steps
    from actserve.recording.replay import Actor
    from actserve.store.artifact import Artifact

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the recording, as in `serve --record DIR`.")]

record = typer.Typer(
    cls=Extended, help="Show and export what `actserve serve --record` recorded.", no_args_is_help=True
)


def open_recording(folder: Path) -> Recording:
    """Raises `UsageError` or `CorruptRecording`."""
    recording: Recording = import_extra("record", "actserve.recording.reader:Recording")(folder)
    return recording


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr. The function advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def replay_on(artifact: Artifact, steps: Steps) -> Replayed:
    """Replay on the best program of an artifact, with a progress bar. Raises as `Player`, and `RuntimeRefused`."""
    from actserve.cli.tools import replay as tool

    with progress_bar("replaying", steps.count) as progress, tool.program(artifact) as (actor, label, runtime):
        return tool.replay(steps, actor, label, runtime, "full", progress)


def replay(
    folder: Folder,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[@VERSION]", help="Policy, and the version that acts; default: the highest of the only policy."
        ),
    ] = None,
    store: Store = DEFAULT_STORE,
    url: Annotated[
        str | None, typer.Option(help="Replay through the service at this URL, on its live version.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Token for the service.", envvar="ACTSERVE_TOKEN")] = None,
    recorded: Annotated[int | None, typer.Option(min=1, help="Only the steps that this version took.")] = None,
    rate: Annotated[
        Literal["own", "full"], typer.Option(help="own: as fast as it was recorded; full: no pauses.")
    ] = "full",
    save: Annotated[
        Path | None, typer.Option(help="Write the first step that diverges to this file, in safetensors.")
    ] = None,
    film: Annotated[
        Path | None, typer.Option(help="Film an episode of screens into this .gif or .mp4, with what the version does.")
    ] = None,
    episode: Annotated[
        str | None, typer.Option(help="The episode to film; default: the first that diverges, else the longest.")
    ] = None,
    speed: Annotated[int, typer.Option(min=1, help="Show every n-th step in the film; 1 shows all.")] = 1,
    json: Json = False,
) -> None:
    """Replay a recording on any version of its policy, and name the first step with another action.

    Exit code 0: every action is the same. 1: an action differs.
    """
    if film is None and (episode is not None or speed != 1):
        raise UsageError("--episode and --speed are for a film: add --film FILE")
    recording = open_recording(folder)
    from actserve.cli.tools import replay as tool

    name, version = recording.named(policy)
    steps = recording.of(name, recorded)
    with ExitStack() as stack:
        actor: Actor
        if url is None:
            artifact = find(open_for_reading(store), name if version is None else f"{name}@{version}")
            actor, label, runtime = stack.enter_context(tool.program(artifact))
        else:
            actor, label, runtime = stack.enter_context(tool.service(url, name, version, token))
        filming = (
            None if film is None else import_extra("play", "actserve.cli.tools.replay_film:Filming")(film, actor, speed)
        )
        with progress_bar("replaying", steps.count) as progress:
            found = tool.replay(steps, actor, label, runtime, rate, progress)
        saved = save if save is not None and tool.save(found, save) else None
        more: dict[str, Any] = {"saved": str(saved)} if saved else {}
        if filming is not None:
            with progress_bar("filming", steps.count) as progress:
                more["film"] = filming.film(steps, found, episode, progress)
    if json:
        print_json(found.as_json() | more)
    else:
        from rich.console import Console

        tool.show(found, Console(), saved, shlex.join(["actserve", *sys.argv[1:]]))
        if "film" in more:
            print("{file}: {steps:,} steps of episode {episode}".format(**more["film"]))
    if found.diverges:
        raise typer.Exit(1)


@record.command()
def show(folder: Folder, json: Json = False) -> None:
    """List what a recording has: policies, versions, episodes, steps."""
    summaries = open_recording(folder).summaries()
    if json:
        print_json({"policies": [summary.as_json() for summary in summaries]})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("policy", "episodes", "incomplete", "steps", "MB", "reward"):
        table.add_column(title, no_wrap=True, justify="left" if title == "policy" else "right")
    table.add_column("time, UTC")
    for each in summaries:
        first = each.first.strftime("%Y-%m-%d %H:%M:%S")
        last = each.last.strftime("%H:%M:%S" if each.first.date() == each.last.date() else "%Y-%m-%d %H:%M:%S")
        numbers = [f"{count:,}" for count in (each.episodes, each.incomplete, each.steps)]
        size = f"{each.size_bytes / 1e6:,.1f}"
        reward = "" if each.reward is None else f"{each.reward:,.5g}"
        table.add_row(f"{each.policy}@{each.version}", *numbers, size, reward, f"{first} to {last}")
    Console().print(table)
