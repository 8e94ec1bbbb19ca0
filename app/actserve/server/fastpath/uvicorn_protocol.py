"""uvicorn's HTTP protocol, for requests that do not take the fast path."""

from __future__ import annotations

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from actserve.server.fastpath.websocket_protocol import FastPathSocket
from actserve.server.http.episode_socket import FAST_PATH
from actserve.server.http.local_peer import CONNECTION
from actserve.server.http.websocket import WebSocketProtocol

MAX_BYTES = 1 << 16  # of a head, of trailers, and of chunk extensions
MAX_AHEAD = 128  # requests that wait for the answer to another
AHEAD_BYTES = 8 << 10  # of such a request: the head as objects, a task to come
_UPGRADING = (b"upgrade", b"http2-settings")
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class UvicornProtocol(HttpToolsProtocol):
    """Adds seven things: the socket in the scope, whether the parser is between two messages, a bound on bytes that
    belong to no body, a bound on requests that were sent ahead, silence towards clients that have disconnected (uvicorn
    would log a traceback for each), answers to clients that have closed their side, and answers to requests that ask
    for an upgrade which is not made.

    A server may ignore such an `Upgrade` (RFC 9110, 7.8). Java's client and `curl --http2` send one to HTTP/2 with the
    first request. The parser would skip the body, and read it as the next request. So the request is parsed again,
    without the header.
    """

    between_messages = True
    closing = False  # after the next answer
    outer: Any  # the `FastPathProtocol` that owns it
    _in_head = False
    _ignores_upgrade = False  # of the request that is being parsed
    _input_ended = False
    _unparsed = 0  # bytes that belong to no body and have not completed a message

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        self._unset_keepalive_if_required()
        self._feed(data)
        if self.between_messages:
            self._unparsed = 0
        elif self._unparsed >= MAX_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(TOO_LARGE)
            self.transport.close()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self._ignores_upgrade:
                self.handle_websocket_upgrade()
                return
            self._ignores_upgrade = False
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._feed(head + data[upgrade.args[0] :])
        except httptools.HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() not in _UPGRADING)
            if name not in _UPGRADING and (value or name != b"connection"):
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _should_upgrade(self) -> bool:
        """A WebSocket begins with GET (RFC 6455, 4.1). Any other request is answered as one without `Upgrade`."""
        return self.parser.get_method() == b"GET" and super()._should_upgrade()

    def handle_websocket_upgrade(self) -> None:
        self.outer.forget()
        super().handle_websocket_upgrade()
        websocket = self.transport.get_protocol()
        if isinstance(websocket, WebSocketProtocol) and websocket.handshake_initiated and not websocket.close_sent:
            stream = FastPathSocket(websocket, self.transport)
            self.transport.set_protocol(stream)
            extensions: Any = websocket.scope["extensions"]
            extensions[FAST_PATH] = stream

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_AHEAD:
            raise OverflowError(f"more than {MAX_AHEAD} requests were sent ahead")  # the parser gives up
        self.between_messages, self._in_head = False, True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are ignored
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._unparsed = False, 0
        # CONNECT is an upgrade by itself, and refused: its target is no path.
        if self.parser.should_upgrade() and not self._should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._ignores_upgrade = True
            return
        super().on_headers_complete()
        self.scope.setdefault("extensions", {})[CONNECTION] = self.transport.get_extra_info("socket")
        if self.closing and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._ignores_upgrade:
            return
        self.between_messages = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._input_ended and self.is_idle:
            self.transport.close()

    def end_input(self) -> bool:
        """The client sends no more. Whether the connection stays open, for answers to requests that are complete."""
        if self.is_idle or not self.between_messages:
            return False
        self._input_ended = True
        return True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def app_until_disconnect(scope: Any, receive: Any, send: Any) -> None:
            async def send_if_connected(message: Any) -> None:
                if cycle.transport.is_closing():
                    cycle.disconnected = True
                await send(message)

            await app(scope, receive, send_if_connected)

        super()._start_asgi_task(cycle, app_until_disconnect)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.pipeline.clear()  # nobody waits for the answers

    @property
    def held_bytes(self) -> int:
        """The memory of the body so far, and of requests that were sent ahead."""
        body_bytes: int = 0 if self.cycle is None else len(self.cycle.body)
        return body_bytes + AHEAD_BYTES * len(self.pipeline)

    @property
    def is_idle(self) -> bool:
        """Whether the next byte begins a message, and no response is in progress."""
        return self.between_messages and not self.pipeline and (self.cycle is None or self.cycle.response_complete)
