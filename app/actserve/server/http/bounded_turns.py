"""BoundedTurnsMiddleware: a turn of the event loop begins a bounded number of requests.

Ten thousand clients that send a request at once would otherwise make one turn of half a minute, in which the worker
sends no heartbeat.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

MAX_BEGUN = 64  # each takes up to a few milliseconds


class BoundedTurnsMiddleware:
    """Requests beyond `MAX_BEGUN` begin in the next turns, in the order in which they came."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner
        self._begun = 0  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            if self._begun >= MAX_BEGUN or self._waiting:
                turn = asyncio.get_running_loop().create_future()
                self._waiting.append(turn)
                await turn
            else:
                self._begin()
        await self._inner(scope, receive, send)

    def _begin(self) -> None:
        if not self._begun:
            asyncio.get_running_loop().call_soon(self._end_turn)
        self._begun += 1

    def _end_turn(self) -> None:
        self._begun = 0
        while self._waiting and self._begun < MAX_BEGUN:
            turn = self._waiting.popleft()
            if not turn.done():  # its request was not cancelled
                self._begin()
                turn.set_result(None)
