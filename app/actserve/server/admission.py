"""Admission: decides whether a request may enter. Every door uses it, and nothing else calls a policy.

The doors are the routes, streams, the Open Inference Protocol over HTTP and gRPC, sessions, the page's games, and the
fast path below ASGI. For each request the order is:

1. The token must be known. It is charged for one item once the head is there (`Admission.open`, or `admit` on the fast
   path).
2. The body has bounds before and after decompression (`max_body_bytes`, `fits`). What all connections hold together is
   bounded too (`memory`).
3. The number of items is bounded. The token is charged for the items after the first.
4. The deadline must be possible, the queue must have room, and the policy must not be closing (`Batcher.admit`).

A request is charged once, also if a later step refuses it. Each check raises the error that the client gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from actserve.core.errors import ActserveError, TooLate, TooManyItems
from actserve.core.settings import Settings
from actserve.core.signature import Arrays, Exploration
from actserve.engine.batch import BatchRequest
from actserve.engine.batcher import Batcher
from actserve.engine.policy import Acted, Policy
from actserve.engine.recorders import StepRecorder
from actserve.server.access.tokens import Access, Token
from actserve.server.memory import Memory


@dataclass(slots=True)
class Ticket:
    """One request's admission. `token` is None if no authentication is configured."""

    token: Token | None = None
    charged: int = 0  # items
    memory: Memory | None = None
    held_bytes: int = 0

    def charge(self, items: int) -> None:
        """Charge for `items` in total. Raises `RateLimited` or `Unauthorized`, but not for items after the first."""
        if self.token is None:
            return
        if not self.charged:
            self.token.charge(items)
        elif items > self.charged:
            self.token.overdraw(items - self.charged)
        self.charged = max(self.charged, items)

    def hold(self, size_bytes: int) -> None:
        """Take memory until `release`. Raises `MemoryFull`."""
        if self.memory is not None:
            self.memory.take(size_bytes)
            self.held_bytes += size_bytes

    def release(self) -> None:
        """Give back what the request holds: it is answered."""
        if self.memory is not None:
            self.memory.give_back(self.held_bytes)
            self.held_bytes = 0


current_ticket: ContextVar[Ticket | None] = ContextVar("ticket", default=None)
"""The ticket of the request in progress; None if the service itself acts."""


def current_token() -> Token | None:
    """The token of the request in progress. It owns the sessions that the request starts."""
    ticket = current_ticket.get()
    return None if ticket is None else ticket.token


def current_client() -> str | None:
    """The name of the token of the request in progress."""
    return name_of(current_token())


def name_of(token: Token | None) -> str | None:
    return None if token is None else token.name


class Admission:
    """The limits of `settings` and the tokens of `access`. Without `access`, no authentication is configured."""

    def __init__(self, settings: Settings | None = None, access: Access | None = None) -> None:
        settings = settings or Settings()
        self.access = access
        self.max_body_bytes = settings.max_body_bytes
        self.max_items = settings.max_items
        self.memory = Memory(settings.max_connection_bytes)

    # the token

    def open(self, authorization: bytes | None) -> Ticket:
        """A ticket for the token in an Authorization header, charged for one item.

        Raises `Unauthorized` or `RateLimited`.
        """
        ticket = Ticket(None if self.access is None else self.access.identify(authorization), memory=self.memory)
        ticket.charge(1)
        return ticket

    def open_message(self, ticket: Ticket | None = None) -> None:
        """Charge for one message of a stream, and make its ticket the current one.

        Without `ticket`, it makes a new one for the same token.

        Raises `RateLimited` or `Unauthorized`.
        """
        ticket = ticket or Ticket(current_token())
        ticket.charge(1)
        current_ticket.set(ticket)

    # the body

    def fits(self, body_bytes: int, items: int) -> bool:
        """Whether a body is within the limits. The routes refuse the others with an error."""
        return body_bytes <= self.max_body_bytes and items <= self.max_items

    # items, deadline, queue

    def check(self, batcher: Batcher, ticket: Ticket, patience_ns: int = 0) -> None:
        """Refuse a request before its body is received, if there is no room for one item. Otherwise it is admitted, and
        charged, once the body is read.

        Raises `RateLimited`, `Unauthorized`, or as `Batcher.admit`.
        """
        try:
            batcher.admit(1, patience_ns)
        except ActserveError:
            ticket.charge(1)
            raise

    def admit(self, batcher: Batcher, items: int, ticket: Ticket, patience_ns: int = 0) -> None:
        """Admit a request of the fast path before its body is received; `enter` queues it once the body is there.

        Raises `TooManyItems`, `RateLimited`, `Unauthorized`, or as `Batcher.admit`.
        """
        self._check_items(items)
        ticket.charge(items)
        batcher.admit(items, patience_ns)

    def enter(self, batcher: Batcher, request: BatchRequest) -> None:
        """Queue a request that was admitted. Raises `NotServing` if the batcher has closed since."""
        batcher.enter(request)

    async def act(
        self,
        policy: Policy,
        tensors: Arrays,
        size: int,
        exploration: Exploration | None = None,
        seed: int | None = None,
        patience_ns: int = 0,
        recorder: StepRecorder | None = None,
    ) -> Acted:
        """Act on `size` items of a valid request, each tensor (size, *shape), and charge the current ticket.

        Without `recorder`, that of its step, it is recorded as a stateless request.

        Raises `TooManyItems`, or as `Policy.act`.
        """
        self._check_items(size)
        ticket = current_ticket.get()
        if ticket is not None:
            ticket.charge(size)
        if recorder is None and policy.recorder is not None:
            recorder = policy.recorder.request(current_client())
        return await policy.act(tensors, size, exploration, seed, patience_ns, recorder)

    @staticmethod
    @asynccontextmanager
    async def deadline(timeout_us: int) -> AsyncIterator[None]:
        """Raises `TooLate` if the block takes longer, including the run of the program. 0 is no deadline."""
        try:
            async with asyncio.timeout(timeout_us / 1e6 if timeout_us else None):
                yield
        except TimeoutError:
            raise TooLate(timeout_us) from None

    def _check_items(self, items: int) -> None:
        if items > self.max_items:
            raise TooManyItems(self.max_items, items)
