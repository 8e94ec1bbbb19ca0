"""`actserve tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actserve.cli.terminal import Json, print_json

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
    json: Json = False,
) -> None:
    """Make a token and print it, once: the file has its hash alone. A service that runs takes it in within a second."""
    from actserve.server.access.tokens import add

    token = add(file, name, rate, sessions)
    if json:
        print_json({"name": name, "token": token})
    else:
        print(token)


@tokens.command()
def show(file: File = Path(DEFAULT_FILE), json: Json = False) -> None:
    """Print whose tokens there are, one a line. To revoke one, delete its line from the file."""
    from actserve.server.access.tokens import read

    tokens = read(file)
    if json:
        told = [{"name": t.name, "sha256": t.digest.hex(), "rate": t.rate, "sessions": t.sessions} for t in tokens]
        print_json({"tokens": told})
        return
    for token in tokens:
        rate = f"{token.rate:g} requests a second" if token.rate else "any rate"
        print(f"{token.name}  {token.digest.hex()[:12]}…  {rate}, {token.sessions or 'the usual'} sessions")
