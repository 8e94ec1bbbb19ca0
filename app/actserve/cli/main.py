"""The `actserve` command. Each command imports its dependencies when it runs, so that `serve` starts fast.

Other packages add commands: a `typer.Typer` in the entry-point group `actserve.commands`. It is loaded only for one of
its commands or for the help.

Exit codes: 0 success; 1 failure, with the reason on stderr; 2 usage error.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from actserve import __version__
from actserve.cli.commands import artifacts, keys, play, recordings, routing, tokens
from actserve.cli.commands.bundles import bundle
from actserve.cli.commands.serve import serve
from actserve.cli.commands.tune import tune
from actserve.cli.plugins import plugin_commands
from actserve.cli.terminal import console, flag
from actserve.core.errors import ActserveError, UsageError, one_line


class Commands(TyperGroup):
    """The commands of this package, then the commands of installed plugins."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(dict.fromkeys([*super().list_commands(ctx), *plugin_commands()]))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or plugin_commands().get(cmd_name)


cli = typer.Typer(
    name="actserve",
    cls=Commands,
    help="Export a trained policy, serve it over HTTP, and play through it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Make": (tune, bundle),
    "Serve": (serve,),
    "Play": (play.play, play.load),
    "Look": (artifacts.inspect, artifacts.verify, artifacts.diff, artifacts.doctor, recordings.replay),
    "Operate": (*routing.ROUTING, keys.sign),
}
for panel, commands in PANELS.items():
    for command in commands:
        cli.command(command.__name__.rstrip("_"), rich_help_panel=panel)(command)
cli.add_typer(keys.keys, name="keys", rich_help_panel="Operate")
cli.add_typer(tokens.tokens, name="tokens", rich_help_panel="Operate")
cli.add_typer(recordings.record, name="record", rich_help_panel="Look")


@cli.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, flag("--version", says="Print the version.")] = False,
    debug: Annotated[bool, flag("--debug", says="Show where an error was raised. Also after a command.")] = False,
) -> None:
    assert not debug, "main takes it away, so that it may stand anywhere"
    if version:
        print(__version__)
        raise typer.Exit


def main() -> NoReturn:
    """Run the command. Prints an error as one line on stderr; with `--debug`, after its traceback."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        cli()
        sys.exit(0)
    except Exception as error:
        from rich.markup import escape

        if debug:
            traceback.print_exc()
        if isinstance(error, ActserveError):
            message = error.message
        else:
            message = f"{type(error).__name__}: {one_line(error)} (unexpected: --debug shows where it was raised)"
        console().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
        sys.exit(2 if isinstance(error, UsageError) else 1)
