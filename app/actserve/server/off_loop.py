"""off_loop: work that takes too long for the event loop.

Two threads do it. More would not be faster, because Python's interpreter lock lets one run, and each holds a body and
what it is decoded to.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

_threads = ThreadPoolExecutor(2, "off loop")  # they start when they are needed


async def call(function: Callable[..., Result], *arguments: object, takes_long: bool) -> Result:
    """The result of `function`; if it `takes_long`, it is called in a thread, and the event loop runs on."""
    if not takes_long:
        return function(*arguments)
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_threads, context.run, function, *arguments)
