"""`actserve tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_FILE = "tokens"

tokens = typer.Typer(help="Make and show the tokens that let clients in.", no_args_is_help=True)
File = Annotated[Path, typer.Option("--file", help="The file that `serve --tokens` takes.", envvar="ACTSERVE_TOKENS")]


@tokens.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose it is; what owns the sessions that are begun with it.")],
    file: File = Path(DEFAULT_FILE),
    rate: Annotated[
        float, typer.Option(min=0, help="Requests a second, each observation of a batch one; 0: no limit.")
    ] = 0,
    sessions: Annotated[int | None, typer.Option(min=1, help="Sessions that may be held.")] = None,
) -> None:
    """Make a token and print it, once: the file has its hash alone. A service that runs takes it in within a second."""
    from app.access import add

    print(add(file, name, rate, sessions))


@tokens.command()
def show(file: File = Path(DEFAULT_FILE)) -> None:
    """Print whose tokens there are, one a line. To revoke one, delete its line from the file."""
    from app.access import read

    for token in read(file):
        rate = f"{token.rate:g} requests a second" if token.rate else "any rate"
        print(f"{token.name}  {token.digest.hex()[:12]}…  {rate}, {token.sessions or 'the usual'} sessions")
