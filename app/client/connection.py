"""One HTTP/1.1 connection that costs its client as little as can be: ready-made requests, one at a time."""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol, cast

import httptools

SEND_BUFFER_BYTES = 1 << 20  # a request with a screen leaves in one call


class Owner(Protocol):
    """Who is told what became of a request. After either call the connection is not `busy`."""

    def answered(self, connection: Connection, status: int, body: bytes) -> None:
        """The whole answer is here."""

    def lost(self, connection: Connection, unanswered: bool) -> None:
        """The connection is gone, by the service's wish or by a fault; `unanswered`: with a request under way."""


class Connection(asyncio.Protocol):
    """`send` a request, and the owner is told of its answer. `since_ns` and `question` are the owner's own notes."""

    def __init__(self, owner: Owner) -> None:
        self.busy = False
        self.question = 0
        self.since_ns = 0
        self._owner = owner
        self._transport: asyncio.WriteTransport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes) -> None:
        assert self._transport is not None
        self.busy = True
        self._transport.write(request)

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

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
            unanswered, self.busy = self.busy, False
            self._owner.lost(self, unanswered)

    # what httptools calls

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self.busy:  # nothing was asked, or it was given up
            return
        self.busy = False
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
        self._owner.answered(self, self._parser.get_status_code(), self._body)
