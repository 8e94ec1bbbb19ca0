"""A connection for load tests that costs little CPU: requests are encoded in advance and sent one at a time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Protocol, cast

import httptools

SEND_BUFFER_BYTES = 1 << 20  # a request with a screen fits, so that one system call sends it

RequestParts = Sequence[bytes]  # of one request, sent in order; not joined, as that would copy 100 KB


class ConnectionListener(Protocol):
    """Gets the events of a `LoadConnection`. After either event the connection is not `busy`."""

    def on_answer(self, connection: LoadConnection, status: int, body: bytes) -> None:
        """The answer is complete."""

    def on_lost(self, connection: LoadConnection, unanswered: bool) -> None:
        """The service or an error closed the connection. `unanswered`: a request was waiting for its answer."""


class RequestScript(Protocol):
    """The requests of one connection, in order."""

    def next(self) -> tuple[int, RequestParts]:
        """The next request, with its key. Requests with the same key must get the same answer."""

    def on_answer(self, status: int) -> bool:
        """Take note of the last request's status. Returns whether the connection goes on."""


class LoadConnection(asyncio.Protocol):
    """Sends the requests of its `script` and reports the answers to its listener."""

    script: RequestScript  # set it before the first `send_next`

    def __init__(self, listener: ConnectionListener) -> None:
        self.busy = False
        self.request_key = 0
        self.due_ns = 0  # latency counts from here; set by the listener
        self._listener = listener
        self._transport: asyncio.WriteTransport | None = None
        self._exchange: asyncio.Future[tuple[int, bytes]] | None = None

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send_next(self) -> None:
        self.request_key, parts = self.script.next()
        self.busy = True
        self._send(parts)

    async def exchange(self, *parts: bytes) -> tuple[int, bytes]:
        """Send one request outside the script -> the answer's status and body. Raises OSError if none comes."""
        if not self.usable:
            raise ConnectionResetError("the service closed the connection")
        self._exchange = asyncio.get_running_loop().create_future()
        self.busy = True
        self._send(parts)
        return await self._exchange

    def drop(self) -> None:
        """Close at once and give up the current request. The listener is not called."""
        self.busy = False
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    # callbacks of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is not a subclass
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def connection_lost(self, error: Exception | None) -> None:
        self._on_closed()

    # hooks for subclasses

    def _send(self, parts: RequestParts) -> None:
        assert self._transport is not None
        self._transport.writelines(parts)

    def _on_answer(self, status: int, body: bytes, keep_alive: bool = True) -> None:
        """Handle a complete answer. `keep_alive`: the service takes more requests on this connection."""
        if not self.busy:  # an answer to no request, or to one that was given up
            return
        self.busy = False
        exchange, self._exchange = self._exchange, None
        goes_on = keep_alive and (exchange is not None or self.script.on_answer(status))
        if not goes_on:
            self._close()
        if exchange is None:
            self._listener.on_answer(self, status, body)
        elif not exchange.done():
            exchange.set_result((status, body))

    def _close(self) -> None:
        """Close after the data in the send buffer has left."""
        if self._transport is not None:
            self._transport.close()

    def _on_closed(self) -> None:
        transport, self._transport = self._transport, None
        if transport is None:
            return
        transport.abort()
        unanswered, self.busy = self.busy, False
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            self._listener.on_lost(self, unanswered)
        elif not exchange.done():
            exchange.set_exception(ConnectionResetError("the service closed the connection"))


class HttpLoadConnection(LoadConnection):
    """HTTP/1.1."""

    def __init__(self, listener: ConnectionListener) -> None:
        super().__init__(listener)
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._on_closed()

    # callbacks of httptools

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._on_answer(self._parser.get_status_code(), self._body, self._parser.should_keep_alive())
