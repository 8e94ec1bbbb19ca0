"""ModelStreamInfer: the requests of one stream, several in flight, answered in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import nullcontext
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

WINDOW = 16  # requests that one stream may have in flight; what is sent ahead of them waits in the sockets' buffers

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class Conversation(Generic[Request, Reply]):
    """Requests that go on from each other, those of one `sequence`, act one after the other; the others at once.

    `act` never raises. `sequence` says which sequence a request is of, or None.
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
        """Until the client has no more to ask (true) or `closing` is set (false); then what was received has been
        answered. Raises what `received` and `send` raise, in an `ExceptionGroup`."""
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read(received, group))
            interrupting = group.create_task(_interrupt(reading, closing))
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
        # A lock lets those that wait in, first come first served, and tasks start in the order of their making.
        turn = nullcontext() if sequence is None else self._turns.setdefault(sequence, asyncio.Lock())
        async with turn:
            return await self._act(request)


async def _interrupt(reading: asyncio.Task[None], closing: asyncio.Event) -> None:
    await closing.wait()
    reading.cancel()
