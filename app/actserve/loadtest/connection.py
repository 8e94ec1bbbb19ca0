"""A connection to the service that costs its client as little as can be: ready-made questions, one at a time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Protocol, cast

import httptools

SEND_BUFFER_BYTES = 1 << 20  # a request with a screen leaves in one call

Parts = Sequence[bytes]  # of one request, to be sent one after the other; not joined, as that would copy 100 KB


class Owner(Protocol):
    """Who is told what became of a question. After either call the connection is not `busy`."""

    def answered(self, connection: LoadConnection, status: int, body: bytes) -> None:
        """The whole answer is here."""

    def lost(self, connection: LoadConnection, unanswered: bool) -> None:
        """The connection is gone, by the service's wish or by a fault; `unanswered`: with a question under way."""


class Script(Protocol):
    """What a connection asks, in order."""

    def next(self) -> tuple[int, Parts]:
        """The next question's number, which every question with the same answer has, and its request."""

    def answered(self, status: int) -> bool:
        """How the last question was answered; whether the connection goes on."""


class LoadConnection(asyncio.Protocol):
    """`ask` what its script says next, and the owner is told of the answer. `since_ns` is the owner's own note."""

    script: Script  # to be set before the first `ask`

    def __init__(self, owner: Owner) -> None:
        self.busy = False
        self.question = 0
        self.since_ns = 0
        self._owner = owner
        self._transport: asyncio.WriteTransport | None = None
        self._waiting: asyncio.Future[tuple[int, bytes]] | None = None

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self) -> None:
        self.question, parts = self.script.next()
        self.busy = True
        self._send(parts)

    async def exchange(self, *parts: bytes) -> tuple[int, bytes]:
        """One request outside of the script -> its answer's status and body. Raises OSError when none comes."""
        if not self.usable:
            raise ConnectionResetError("the service closed the connection")
        self._waiting = asyncio.get_running_loop().create_future()
        self.busy = True
        self._send(parts)
        return await self._waiting

    def drop(self) -> None:
        """Close at once and forget what is under way; the owner is not told."""
        self.busy = False
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is not a subclass
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def connection_lost(self, error: Exception | None) -> None:
        self._end()

    # for those who know how to read

    def _send(self, parts: Parts) -> None:
        assert self._transport is not None
        self._transport.writelines(parts)

    def _received(self, status: int, body: bytes, more: bool = True) -> None:
        """A whole answer; `more`: the connection takes further requests."""
        if not self.busy:  # nothing was asked, or it was given up
            return
        self.busy = False
        waiting, self._waiting = self._waiting, None
        goes_on = more and (waiting is not None or self.script.answered(status))
        if not goes_on:
            self._close()
        if waiting is None:
            self._owner.answered(self, status, body)
        elif not waiting.done():
            waiting.set_result((status, body))

    def _close(self) -> None:
        """When what was sent has left."""
        if self._transport is not None:
            self._transport.close()

    def _end(self) -> None:
        transport, self._transport = self._transport, None
        if transport is None:
            return
        transport.abort()
        unanswered, self.busy = self.busy, False
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            self._owner.lost(self, unanswered)
        elif not waiting.done():
            waiting.set_exception(ConnectionResetError("the service closed the connection"))


class HttpConnection(LoadConnection):
    """HTTP/1.1."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end()

    # what httptools calls

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._received(self._parser.get_status_code(), self._body, self._parser.should_keep_alive())
