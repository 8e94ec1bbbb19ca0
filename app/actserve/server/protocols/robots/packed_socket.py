"""A robot's WebSocket whose messages are maps in msgpack."""

from __future__ import annotations

from abc import abstractmethod
from time import perf_counter_ns
from typing import Any

import numpy as np

from actserve.core.errors import MalformedBody
from actserve.core.signature import Array, Arrays
from actserve.server import off_loop
from actserve.server.http.episode_socket import Message, SteppableEpisode
from actserve.server.protocols.robots.layout import MAX_FIXED_BYTES, Layout
from actserve.server.protocols.robots.names import flatten
from actserve.server.protocols.robots.packed import unpack, unpack_in_place
from actserve.server.protocols.robots.socket import SocketWire
from actserve.wire.payload import MANY_BYTES


class PackedWire(SocketWire, SteppableEpisode):
    """A wire with two kinds of messages: steps, which have an observation and a reply, and others."""

    begun_ns = 0  # when the message in progress came
    _layout: Layout | None = None  # of the last message, if that was a step on the fast path
    _misses = 0  # messages since one had the layout of the one before

    @abstractmethod
    def observation(self, request: Any) -> Any | None:
        """The observation of a message that is a step; None for other messages. Raises `MalformedBody`.

        The contents of arrays must not matter.
        """

    @abstractmethod
    async def answer_other(self, request: Any) -> Message | None:
        """The reply to a message that is not a step, if it has one. Raises an `ActserveError`."""

    async def answer(self, message: Message) -> Message | None:
        self.begun_ns, self._layout = perf_counter_ns(), None
        if isinstance(message, str):
            raise MalformedBody("expected a binary message, a map in msgpack; got text")
        request = await off_loop.call(unpack, message, takes_long=len(message) > MANY_BYTES)
        observation = self.observation(request)
        if observation is None:
            return await self.answer_other(request)
        return self.reply(await self.episode.step(observation, self.patience_ns))

    # on the fast path

    def takes(self, size_bytes: int) -> bool:
        return self.state.chunks is None and size_bytes <= min(MANY_BYTES, self.max_message_bytes)

    def read(self, message: Array) -> Arrays | None:
        self.begun_ns = perf_counter_ns()
        found = None if self._layout is None else self._layout.read(message)
        if found is None:
            found = self._unpack(message)
        else:
            self._misses = 0
        return None if found is None else self.episode.convert(found)

    def _unpack(self, message: Array) -> dict[str, Any] | None:
        """The value of each input in a message of another layout; None if it is more than a step."""
        self._layout = None
        observation = self.observation(unpack(message.data))
        found = None if observation is None else self.episode.locate(observation)
        if found is not None:
            self._misses += 1
            if self._misses.bit_count() == 1:  # after 1, 2, 4, 8: it costs as much as the message itself
                self._layout = self._learn(message)
        return found

    def _learn(self, message: Array) -> Layout | None:
        try:
            observation = self.observation(unpack_in_place(message.data))
        except MalformedBody:  # it has too many values
            return None
        found = self.episode.locate(observation)
        assert found is not None
        arrays = [value for value in flatten(observation).values() if isinstance(value, np.ndarray)]
        layout = Layout(message, found, arrays)
        return layout if layout.fixed_bytes <= MAX_FIXED_BYTES else None
