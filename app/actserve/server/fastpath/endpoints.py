"""Endpoints: the live policies behind the fast path's URLs, and their prebuilt answers."""

from __future__ import annotations

import asyncio
import itertools
import logging
from time import monotonic
from typing import Protocol

from fastapi import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from actserve import wire
from actserve.core.errors import ActserveError, MemoryFull, Unavailable
from actserve.core.repeat import repeat
from actserve.core.settings import Settings
from actserve.core.signature import Array
from actserve.engine import malloc
from actserve.engine.arena import BATCHES, Arena
from actserve.engine.batch import BatchResult
from actserve.engine.batcher import Batcher
from actserve.engine.policy import Policy
from actserve.engine.registry import Registry
from actserve.server.admission import Admission
from actserve.server.fastpath.request_heads import NOTHING_OBSERVED, HeadParser, Observed, RequestHead
from actserve.server.http import error_responses as errors
from actserve.telemetry.counts import ACT, Tally

log = logging.getLogger("actserve")

Headers = list[tuple[bytes, bytes]]
UNAVAILABLE = str(errors.STATUS[Unavailable])
WATCH_EVERY_S = 1.0
WATCHED_AT_ONCE = 500  # connections, in one turn of the event loop
TRIM_EVERY = 10  # after so many watches, memory of closed connections is returned to the system
MAX_REFUSALS = 64  # cached
MAX_ANSWERS = 4096  # cached; a policy with more actions has each answer built


class Endpoint:
    """One live policy: its batcher, and its responses, byte for byte as the route would write them."""

    def __init__(self, batcher: Batcher, arena: Arena, policy: Policy, tally: Tally) -> None:
        self.batcher, self.arena = batcher, arena
        self.item_bytes = arena.item_bytes
        (self.observation,) = policy.signature.observations
        self.dtype = self.observation.dtype
        self.max_items = min(BATCHES * policy.tuning.batch, policy.signature.max_batch)
        self._tally = tally
        self._policy = policy  # keeps it loaded
        spec = policy.signature.action
        self._action = spec.name
        self._discrete = spec.shape == () and spec.numpy_dtype.kind in "iu"
        self._headers: Headers = []
        self._answers: dict[int, bytes] = {}
        self._refusals: dict[str, bytes] = {}  # by the error's message

    def answer(self, outcome: BatchResult, start: int, items: int, headers: Headers) -> bytes:
        """The response for `items` items of a batch from `start` on.

        `headers` are the server's own: a new list every second, with the date.
        """
        self._tally.answered += 1
        actions = outcome.outputs[self._action]
        if not self._discrete or items > 1:
            return self._build(actions[start : start + items], headers)
        self._renew(headers)
        action = int(actions[start])
        answer = self._answers.get(action)
        if answer is None:
            answer = self._answers[action] = self._build(actions[start : start + 1], headers)
        return answer

    def refusal(self, error: ActserveError, headers: Headers) -> bytes:
        if not isinstance(error, Unavailable):  # rare, and logged
            response = errors.response(error)
            self._tally.add(str(response.status_code), error.code)
            return serialised(response, headers)
        self._tally.add(UNAVAILABLE, error.code)
        self._renew(headers)
        refusal = self._refusals.get(error.message)
        if refusal is None:
            refusal = self._refusals[error.message] = serialised(errors.response(error), headers)
        return refusal

    def _renew(self, headers: Headers) -> None:
        """Empty the caches when the server's headers have changed, or when they are full."""
        if headers is not self._headers or len(self._answers) > MAX_ANSWERS or len(self._refusals) > MAX_REFUSALS:
            self._headers, self._answers, self._refusals = headers, {}, {}

    def _build(self, action: Array, headers: Headers) -> bytes:
        content_type, content = wire.encode("", {self._action: action}, self._policy.signature.outputs, len(action) > 1)
        return serialised(Response(content, media_type=content_type), headers)


def serialised(response: Response, headers: Headers) -> bytes:
    """A response as uvicorn writes it."""
    fields = b"".join(b"%s: %s\r\n" % field for field in (*headers, *response.raw_headers))
    return STATUS_LINE[response.status_code] + fields + b"\r\n" + bytes(response.body)


class TimedConnection(Protocol):
    def close_if_idle(self) -> None:
        """Called once a second: close if nothing has happened for too long."""

    def abandon(self) -> None:
        """Close at once. Never raises."""

    @property
    def held_bytes(self) -> int:
        """The memory of requests that were sent ahead, and of answers that the client does not read."""


class FastPath:
    """The endpoints of all live policies of a registry, and the open connections. Enter it to serve.

    `patience_s` is how long a client may take to send a request or to take an answer.
    """

    def __init__(
        self, registry: Registry, admission: Admission, settings: Settings, observed: Observed = NOTHING_OBSERVED
    ) -> None:
        self.admission = admission
        self.patience_s = settings.request_timeout_s
        self.max_connections = settings.max_connections
        self.connections: set[TimedConnection] = set()
        self._root_path = settings.root_path
        self._registry = registry
        self._observed = observed
        self._generation = -1  # of the registry and of the tokens, when the endpoints were built
        self._tokens_generation = 0
        self._heads: HeadParser[Endpoint] = HeadParser({})
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
        self._registry.check_programs(int(elapsed_s * 1e9))
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
        arenas = [arena for policy in self._registry.live if (arena := policy.batcher.arena) is not None]
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
        self._registry.counts.tally("", "fastpath", "").add(status, code)

    def find(self, head: bytes) -> RequestHead[Endpoint] | None:
        """As `HeadParser.find`."""
        self._refresh()
        return self._heads.find(head)

    def _refresh(self) -> None:
        """Build the endpoints anew if the live policies have changed: an endpoint keeps its policy in memory."""
        if self._generation != self._registry.generation:
            self._generation = self._registry.generation
            self._build()

    def _build(self) -> None:
        endpoints: dict[bytes, Endpoint] = {}
        for policy in self._registry.live:
            batcher, name = policy.batcher, policy.name
            if self._registry.has_candidate(name):
                continue  # with a canary or a shadow, the route chooses the version
            if batcher.arena is not None and not policy.signature.state:  # the answer to state is not prebuilt
                tally = self._registry.counts.tally(name, "fastpath", ACT)
                endpoint = Endpoint(batcher, batcher.arena, policy, tally)
                paths = [f"/policies/{name}/act", *(["/act"] if name == self._registry.default else [])]
                for prefix in {"", self._root_path}:  # a proxy may remove it or leave it
                    endpoints |= {f"{prefix}{path}".encode(): endpoint for path in paths}
        access = self.admission.access
        find_token = None
        if access is not None:
            self._tokens_generation = access.generation
            find_token = access.find
        self._heads = HeadParser(endpoints, self.admission.fits, find_token, self._observed)
