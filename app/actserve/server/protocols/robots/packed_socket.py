"""A robot's WebSocket whose messages are maps in msgpack."""

from __future__ import annotations

from abc import abstractmethod
from time import perf_counter_ns
from typing import Any

from actserve.core.errors import MalformedBody
from actserve.core.signature import Array, Arrays
from actserve.server import off_loop
from actserve.server.http.episode_socket import Message, SteppableEpisode
from actserve.server.protocols.robots.packed import unpack
from actserve.server.protocols.robots.socket import SocketWire
from actserve.wire.payload import MANY_BYTES


class PackedWire(SocketWire, SteppableEpisode):
    """A wire with two kinds of messages: steps, which have an observation and a reply, and others."""

    begun_ns = 0  # when the message in progress came

    @abstractmethod
    def observation(self, request: Any) -> Any | None:
        """The observation of a message that is a step; None for other messages. Raises `MalformedBody`."""

    @abstractmethod
    async def answer_other(self, request: Any) -> Message | None:
        """The reply to a message that is not a step, if it has one. Raises an `ActserveError`."""

    async def answer(self, message: Message) -> Message | None:
        self.begun_ns = perf_counter_ns()
        if isinstance(message, str):
            raise MalformedBody("expected a binary message, a map in msgpack; got text")
        request = await off_loop.call(unpack, message, takes_long=len(message) > MANY_BYTES)
        observation = self.observation(request)
        if observation is None:
            return await self.answer_other(request)
        return self.reply(await self.episode.step(observation, self.patience_ns))

    def takes(self, size_bytes: int) -> bool:
        return size_bytes <= min(MANY_BYTES, self.max_message_bytes)

    def read(self, message: Array) -> Arrays | None:
        self.begun_ns = perf_counter_ns()
        observation = self.observation(unpack(message.data))
        found = None if observation is None else self.episode.locate(observation)
        return None if found is None else self.episode.convert(found)
