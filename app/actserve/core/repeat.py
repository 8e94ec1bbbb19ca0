"""repeat: background work that must not end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger("actserve")


async def repeat(every_s: float, work: Callable[[], Awaitable[None]], what: str) -> None:
    """Call `work` every `every_s` seconds until cancelled. If it raises, the error is logged once, and it goes on."""
    before = ""
    while True:
        await asyncio.sleep(every_s)
        try:
            await work()
            before = ""
        except Exception as error:
            if before != repr(error):
                log.exception("%s failed; it is tried again", what)
            before = repr(error)
