"""Memory: what all connections of one worker may hold, in bytes.

Large and lasting things are taken from it before they are allocated: connections, bodies, streams, games. Requests that
were sent ahead, and answers that a client does not read, are measured once a second. If the limit is reached, what is
new is refused; if the measured bytes exceed it, the connections that hold the most are closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from actserve.core.errors import MemoryFull

CONNECTION_BYTES = 16 << 10  # of an idle connection: two protocols, a transport, a parser, the head of a request
STREAM_BYTES = 64 << 10  # with the buffers of a WebSocket, and its tasks
GAME_BYTES = 16 << 20  # an emulator, pictures that wait to be sent
RESERVED_BYTES = 64 << 20  # at most, for announced bodies that are still to come
RESERVED_SHARE = 8  # of the limit: one of so many parts


UNCOUNTED_SHARE = 8  # of the limit, one of so many parts is left for the allocator's pieces, parsers and tasks


class Memory:
    """`taken_bytes` are those in use or promised, `measured_bytes` the further ones at the last measurement."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes - limit_bytes // UNCOUNTED_SHARE
        self.taken_bytes = 0
        self.measured_bytes = 0
        self.reserved_bytes = 0
        self.max_reserved_bytes = min(RESERVED_BYTES, limit_bytes // RESERVED_SHARE)

    @property
    def free_bytes(self) -> int:
        return self.limit_bytes - self.taken_bytes - self.measured_bytes

    def take(self, size_bytes: int) -> None:
        """Raises `MemoryFull`. `give_back` the same size later."""
        if size_bytes > self.free_bytes:
            raise MemoryFull(self.limit_bytes)
        self.taken_bytes += size_bytes

    def take_in_any_case(self, size_bytes: int) -> None:
        """For memory that is moved, and was counted nowhere. `give_back` the same size later."""
        self.taken_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self.taken_bytes -= size_bytes

    @contextmanager
    def taken(self, size_bytes: int) -> Iterator[None]:
        """Raises `MemoryFull`."""
        self.take(size_bytes)
        try:
            yield
        finally:
            self.give_back(size_bytes)

    def reserve(self, size_bytes: int) -> bool:
        """Whether memory for a body of this size may be allocated before the body has come. Then `release` it later."""
        if self.reserved_bytes + size_bytes > self.max_reserved_bytes or size_bytes > self.free_bytes:
            return False
        self.reserved_bytes += size_bytes
        self.taken_bytes += size_bytes
        return True

    def release(self, size_bytes: int) -> None:
        self.reserved_bytes -= size_bytes
        self.taken_bytes -= size_bytes
