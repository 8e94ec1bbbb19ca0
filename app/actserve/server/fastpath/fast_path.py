"""FastPath: the live policies behind the fast path's URLs, and the open connections."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Protocol

from actserve.core.errors import MemoryFull
from actserve.core.repeat import repeat
from actserve.core.settings import Settings
from actserve.engine import malloc
from actserve.engine.registry import Registry
from actserve.server.admission import Admission
from actserve.server.fastpath.act_codec import UNAVAILABLE, act_resources
from actserve.server.fastpath.codec import Resource, Resources
from actserve.server.fastpath.endpoint import Endpoint
from actserve.server.fastpath.request_heads import HeadParser, RequestHead
from actserve.server.sessions import Sessions

log = logging.getLogger("actserve")

WATCH_EVERY_S = 1.0
WATCHED_AT_ONCE = 500  # connections, in one turn of the event loop
TRIM_EVERY = 10  # after so many watches, memory of closed connections is returned to the system

ResourcesOf = Callable[[Endpoint, Registry, Settings], Resources]
"""A protocol's resources for one policy, by path."""


class TimedConnection(Protocol):
    def close_if_idle(self) -> None:
        """Called once a second: close if nothing has happened for too long."""

    def abandon(self) -> None:
        """Close at once. Never raises."""

    @property
    def held_bytes(self) -> int:
        """The memory of requests that were sent ahead, and of answers that the client does not read."""


class FastPath:
    """The resources of all live policies of a registry, and the open connections. Enter it to serve.

    `patience_s` is how long a client may take to send a request or to take an answer. `traced` is as in `HeadParser`.
    """

    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        sessions: Sessions,
        settings: Settings,
        traced: bool = False,
        protocols: Sequence[ResourcesOf] = (act_resources,),
    ) -> None:
        self.admission, self.sessions, self.registry = admission, sessions, registry
        self.patience_s = settings.request_timeout_s
        self.max_connections = settings.max_connections
        self.connections: set[TimedConnection] = set()
        self._settings, self._protocols = settings, protocols
        self._traced = traced
        self._generation = -1  # of the registry and of the tokens, when the resources were built
        self._tokens_generation = 0
        self._heads: HeadParser = HeadParser({})
        self._watches = itertools.count()
        self._watched: set[int] = set()  # connections at the last trim

    async def __aenter__(self) -> FastPath:
        self._watched_s = monotonic()
        self._watching = asyncio.create_task(repeat(WATCH_EVERY_S, self._watch, "watching the connections"))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watching.cancel()

    async def _watch(self) -> None:
        """Called once a second."""
        now_s = monotonic()
        # A longer second is a pause of this process, in which no program could run.
        elapsed_s, self._watched_s = min(now_s - self._watched_s, 2 * WATCH_EVERY_S), now_s
        self.registry.check_programs(int(elapsed_s * 1e9))
        self._refresh()
        await self._watch_connections()
        access = self.admission.access
        if access is not None:
            access.reload_if_changed()
            if self._tokens_generation != access.generation:
                self._generation = -1  # cached heads may hold tokens that were revoked
        if next(self._watches) % TRIM_EVERY == 0:
            now = set(map(id, self.connections))
            if self._watched - now:  # closed connections have freed their memory
                await asyncio.to_thread(malloc.trim)
            self._watched = now

    async def _watch_connections(self) -> None:
        """Close those that are idle for too long and, while all hold too much, those that hold the most."""
        held: dict[TimedConnection, int] = {}
        for number, connection in enumerate(list(self.connections)):
            try:
                connection.close_if_idle()
                if held_bytes := connection.held_bytes:
                    held[connection] = held_bytes
            except Exception:  # the others are watched all the same
                if connection in self.connections:  # it has not closed meanwhile
                    log.exception("a connection could not be watched; it is closed")
                    connection.abandon()
            if number % WATCHED_AT_ONCE == WATCHED_AT_ONCE - 1:
                await asyncio.sleep(0)
        memory = self.admission.memory
        arenas = [arena for policy in self.registry.live if (arena := policy.batcher.arena) is not None]
        total_bytes = sum(held.values())
        if memory.taken_bytes + total_bytes > memory.limit_bytes // 2:
            for arena in arenas:
                arena.drop_spare()
        memory.measured_bytes = total_bytes + sum(arena.spare_bytes for arena in arenas)
        for connection in sorted(held, key=held.__getitem__, reverse=True):
            if memory.free_bytes >= 0:
                break
            self.count(UNAVAILABLE, MemoryFull.code)
            log.warning("connections hold too much memory: one with %d bytes is closed", held[connection])
            memory.measured_bytes -= held[connection]
            connection.abandon()

    def count(self, status: str, code: str) -> None:
        """Count an answer to a connection that has sent no whole request."""
        self.registry.counts.tally("", "fastpath", "").add(status, code)

    def find(self, head: bytes) -> RequestHead | None:
        """As `HeadParser.find`."""
        self._refresh()
        return self._heads.find(head)

    def _refresh(self) -> None:
        """Build the resources anew if the live policies have changed: they keep a policy in memory."""
        if self._generation != self.registry.generation:
            self._generation = self.registry.generation
            self._build()

    def _build(self) -> None:
        resources: dict[bytes, Resource] = {}
        for policy in self.registry.live:
            if self.registry.has_candidate(policy.name):
                continue  # with a canary or a shadow, the route chooses the version
            if policy.batcher.arena is not None and not self._settings.access_log:  # the routes log
                endpoint = Endpoint(policy, policy.batcher.arena)
                for resources_of in self._protocols:
                    found = resources_of(endpoint, self.registry, self._settings)
                    for prefix in {"", self._settings.root_path}:  # a proxy may remove it or leave it
                        resources |= {prefix.encode() + path: resource for path, resource in found.items()}
        access = self.admission.access
        find_token = None
        if access is not None:
            self._tokens_generation = access.generation
            find_token = access.find
        self._heads = HeadParser(resources, self.admission.fits, find_token, self._traced)
