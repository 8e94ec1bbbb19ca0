"""The `actserve` command. What a subcommand needs is imported when it runs, so that serving starts fast.

Exit code 0: the job was done; 1: it could not be, and stderr says why; 2: a usage error.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from app import __version__
from app.commands import artifacts, keys, offline, play, routing, tokens
from app.commands.serve import serve
from app.commands.terminal import console, flag
from app.commands.tune import tune
from app.errors import ActserveError, UsageError

cli = typer.Typer(
    name="actserve",
    help="Turn a TorchRL policy into a service, and play through it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
GROUPS = {
    "Make": (offline.train, offline.export, offline.compile_, tune),
    "Serve": (serve,),
    "Play": (play.play, play.load, play.bench),
    "Look": (artifacts.inspect, artifacts.verify, artifacts.diff, artifacts.doctor),
    "Operate": (*routing.ROUTING, keys.sign),
}
for title, commands in GROUPS.items():
    for command in commands:
        cli.command(command.__name__.rstrip("_"), rich_help_panel=title)(command)
cli.add_typer(keys.keys, name="keys", rich_help_panel="Operate")
cli.add_typer(tokens.tokens, name="tokens", rich_help_panel="Operate")


@cli.callback(invoke_without_command=True)
def _root(version: Annotated[bool, flag("--version", says="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> NoReturn:
    """Run the command; turn every error that a user can mend into one line on stderr."""
    try:
        cli()
        sys.exit(0)
    except ActserveError as error:
        from rich.markup import escape

        console().print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True, highlight=False)
        sys.exit(2 if isinstance(error, UsageError) else 1)
