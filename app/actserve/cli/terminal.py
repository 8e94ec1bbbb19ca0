"""Output of the commands: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def flag(*names: str, says: str) -> Any:
    """An option without a value, whose help text is `says`. The empty metavar hides typer's <bool>."""
    return typer.Option(*names, metavar="", help=says)


Json = Annotated[bool, flag("--json", says="Print one JSON object on stdout and nothing else.")]


@cache
def console() -> Console:
    """The console on stderr."""
    from rich.console import Console

    return Console(stderr=True)


def print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document))


@contextmanager
def steps(first: str) -> Iterator[Callable[[str], None]]:
    """A live line with the current step. The finished steps stay above it."""
    with console().status(first) as status:

        def progress(step: str) -> None:
            console().print(f"  {step}")
            status.update(step)

        yield progress
