"""Doors: the paths that lead to a policy through the lane, and the policies' ready-made answers."""

from __future__ import annotations

import asyncio
import itertools
from typing import Protocol

from fastapi import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from actserve import wire
from actserve.core.errors import ActserveError, Unavailable
from actserve.core.signature import Array
from actserve.engine import malloc as memory
from actserve.engine.arena import BATCHES, Arena
from actserve.engine.batcher import Batcher, BatchResult
from actserve.engine.policy import Policy
from actserve.engine.registry import Registry
from actserve.server.access.tokens import Access
from actserve.server.fastpath.heads import BodySize, HeadParser, RequestHead
from actserve.server.http import error_responses as errors
from actserve.telemetry.counts import ACT, Tally

Headers = list[tuple[bytes, bytes]]
UNAVAILABLE = str(errors.STATUS[Unavailable])
REFUSALS = 64
GIVE_BACK_S = 10
READY_MADE = 4096  # answers; a policy with more actions has them made one by one


class Endpoint:
    """One policy's entry: where its requests go, and what its answers are, byte for byte as the route's would be."""

    def __init__(self, batcher: Batcher, arena: Arena, policy: Policy, tally: Tally) -> None:
        self.batcher, self.arena = batcher, arena
        self.size = BodySize(arena.item_bytes, min(BATCHES * policy.tuning.batch, policy.signature.max_batch))
        self._tally = tally
        self._policy = policy  # which stays loaded for as long as the door is open
        spec = policy.signature.action
        self._action = spec.name
        self._discrete = spec.shape == () and spec.numpy_dtype.kind in "iu"
        self._headers: Headers = []
        self._answers: dict[int, bytes] = {}
        self._refusals: dict[str, bytes] = {}  # by the error's message

    def answer(self, outcome: BatchResult, start: int, items: int, headers: Headers) -> bytes:
        """The whole response for the items from `start` on. `headers`: the server's own, a new list every second."""
        self._tally.answered += 1
        actions = outcome.outputs[self._action]
        if not self._discrete or items > 1:
            return self._make(actions[start : start + items], headers)
        if headers is not self._headers or len(self._answers) > READY_MADE:
            self._headers, self._answers, self._refusals = headers, {}, {}
        action = int(actions[start])
        answer = self._answers.get(action)
        if answer is None:
            answer = self._answers[action] = self._make(actions[start : start + 1], headers)
        return answer

    def refusal(self, error: ActserveError, headers: Headers) -> bytes:
        if not isinstance(error, Unavailable):  # it is rare, and for the log
            response = errors.response(error)
            self._tally.add(str(response.status_code), error.code)
            return serialised(response, headers)
        self._tally.add(UNAVAILABLE, error.code)
        if headers is not self._headers or len(self._refusals) > REFUSALS:
            self._headers, self._answers, self._refusals = headers, {}, {}
        refusal = self._refusals.get(error.message)
        if refusal is None:
            refusal = self._refusals[error.message] = serialised(errors.response(error), headers)
        return refusal

    def _make(self, action: Array, headers: Headers) -> bytes:
        content_type, content = wire.encode("", {self._action: action}, len(action) > 1)
        return serialised(Response(content, media_type=content_type), headers)


def serialised(response: Response, headers: Headers) -> bytes:
    """A response as uvicorn writes it."""
    fields = b"".join(b"%s: %s\r\n" % field for field in (*headers, *response.raw_headers))
    return STATUS_LINE[response.status_code] + fields + b"\r\n" + bytes(response.body)


class TimedConnection(Protocol):
    def look(self) -> None:
        """What the lane calls once a second: close if nothing has happened for too long."""


class FastPath:
    """The doors to all live policies of a registry, and the connections that may come to them. Enter it to serve.

    `patience_s`: how long a client may take to send a request, or to take an answer. `access`: who may come; None:
    everybody.
    """

    def __init__(
        self, registry: Registry, patience_s: float, max_connections: int = 10_000, access: Access | None = None
    ) -> None:
        self.patience_s = patience_s
        self.max_connections = max_connections
        self.connections: set[TimedConnection] = set()
        self._registry = registry
        self._generation = -1
        self._access, self._access_generation = access, 0
        self._heads: HeadParser[Endpoint] = HeadParser({}, {})

    async def __aenter__(self) -> FastPath:
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watching.cancel()

    async def _watch(self) -> None:
        before: set[int] = set()
        for second in itertools.count():
            await asyncio.sleep(1)
            if second % GIVE_BACK_S == 0:
                now = set(map(id, self.connections))
                if before - now:
                    await asyncio.to_thread(memory.give_back)  # what those had who have gone
                before = now
            self._look()
            for connection in list(self.connections):
                connection.look()
            if self._access is not None:
                self._access.look()
                if self._access_generation != self._access.generation:
                    self._generation = -1  # forget the heads that were read

    def count(self, status: str, code: str) -> None:
        """An answer to what was no request yet."""
        self._registry.counts.tally("", "lane", "").add(status, code)

    def find(self, head: bytes) -> RequestHead[Endpoint] | None:
        """See `HeadParser.find`."""
        self._look()
        return self._heads.find(head)

    def _look(self) -> None:
        """Let go of the doors to what is not live any more."""
        if self._generation != self._registry.generation:
            self._generation = self._registry.generation
            self._rebuild()

    def _rebuild(self) -> None:
        doors: dict[bytes, Endpoint] = {}
        for policy in self._registry.live:
            batcher, name = policy.batcher, policy.name
            if self._registry.has_candidate(name):
                continue  # with a canary or a shadow, the route says who acts
            if batcher.arena is not None and not policy.signature.state:  # whose answers have more in them
                tally = self._registry.counts.tally(name, "lane", ACT)
                door = doors[f"/policies/{name}/act".encode()] = Endpoint(batcher, batcher.arena, policy, tally)
                if name == self._registry.default:
                    doors[b"/act"] = door
        sizes = {path: door.size for path, door in doors.items()}
        if self._access is None:
            self._heads = HeadParser(doors, sizes)
        else:
            self._access_generation = self._access.generation
            self._heads = HeadParser(doors, sizes, self._access.find)
