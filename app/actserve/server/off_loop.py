"""off_loop: work that takes too long for the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def call(function: Callable[..., Result], *arguments: object, takes_long: bool) -> Result:
    """The result of `function`; if it `takes_long`, it is called in a thread, and the event loop runs on."""
    return await asyncio.to_thread(function, *arguments) if takes_long else function(*arguments)
