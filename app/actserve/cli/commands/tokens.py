"""`actserve tokens`: the file of tokens that `serve --tokens` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actserve.cli.terminal import Json, print_json

DEFAULT_FILE = "tokens"

tokens = typer.Typer(help="Create and show the tokens that clients authenticate with.", no_args_is_help=True)
File = Annotated[Path, typer.Option("--file", help="File of tokens, for `serve --tokens`.", envvar="ACTSERVE_TOKENS")]


@tokens.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the client; sessions begun with the token belong to it.")],
    file: File = Path(DEFAULT_FILE),
    rate: Annotated[
        float,
        typer.Option(min=0, help="Rate limit in requests per second; a batch counts one per observation. 0: no limit."),
    ] = 0,
    sessions: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of open sessions. Default: the service's limit.")
    ] = None,
    json: Json = False,
) -> None:
    """Create a token and print it. It is shown only now: the file stores only its hash.

    A running service accepts the token within a second.
    """
    from actserve.server.access.tokens import add_token

    token = add_token(file, name, rate, sessions)
    if json:
        print_json({"name": name, "token": token})
    else:
        print(token)


@tokens.command()
def show(file: File = Path(DEFAULT_FILE), json: Json = False) -> None:
    """List the tokens, one per line. To revoke a token, delete its line from the file."""
    from actserve.server.access.tokens import read_tokens

    tokens = read_tokens(file)
    if json:
        listed = [{"name": t.name, "sha256": t.digest.hex(), "rate": t.rate, "sessions": t.sessions} for t in tokens]
        print_json({"tokens": listed})
        return
    for token in tokens:
        rate = f"{token.rate:g} requests per second" if token.rate else "no rate limit"
        print(f"{token.name}  {token.digest.hex()[:12]}…  {rate}, {token.sessions or 'default number of'} sessions")
