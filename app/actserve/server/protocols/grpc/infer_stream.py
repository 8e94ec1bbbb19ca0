"""InferStream: the requests of one ModelStreamInfer call. Several are in flight; responses keep the request order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import nullcontext
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

WINDOW = 16  # requests in flight in one stream; further ones wait in the buffers of the sockets

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class InferStream(Generic[Request, Reply]):
    """Runs requests of the same sequence one after the other, all others concurrently.

    `act` never raises. `sequence` returns the sequence of a request, or None.
    """

    def __init__(
        self,
        act: Callable[[Request], Awaitable[Reply]],
        sequence: Callable[[Request], Hashable | None],
        send: Callable[[Reply], Awaitable[None]],
    ) -> None:
        self._act = act
        self._sequence = sequence
        self._send = send
        self._turns: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()
        self._window = asyncio.Semaphore(WINDOW)
        self._in_flight: asyncio.Queue[asyncio.Task[Reply] | None] = asyncio.Queue()

    async def run(self, received: AsyncIterator[Request], closing: asyncio.Event) -> bool:
        """Answer requests until the client ends the stream (returns true) or `closing` is set (false).

        All requests that were received are answered. Errors of `received` and `send` are raised in an `ExceptionGroup`.
        """
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read(received, group))
            interrupting = group.create_task(_cancel_when(closing, reading))
            while (task := await self._in_flight.get()) is not None:
                await self._send(await task)
                self._window.release()
            interrupting.cancel()
        return not reading.cancelled()

    async def _read(self, received: AsyncIterator[Request], group: asyncio.TaskGroup) -> None:
        try:
            await self._window.acquire()
            async for request in received:
                self._in_flight.put_nowait(group.create_task(self._act_in_turn(request)))
                await self._window.acquire()
        finally:
            self._in_flight.put_nowait(None)

    async def _act_in_turn(self, request: Request) -> Reply:
        sequence = self._sequence(request)
        # A lock is first come, first served, and tasks start in the order of their creation.
        turn = nullcontext() if sequence is None else self._turns.setdefault(sequence, asyncio.Lock())
        async with turn:
            return await self._act(request)


async def _cancel_when(closing: asyncio.Event, reading: asyncio.Task[None]) -> None:
    await closing.wait()
    reading.cancel()
