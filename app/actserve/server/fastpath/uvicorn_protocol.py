"""uvicorn's HTTP protocol, for requests that do not take the fast path."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from actserve.server.fastpath.websocket_protocol import FastPathStream
from actserve.server.http.stream import FAST_PATH
from actserve.server.http.websocket import WebSocketProtocol

MAX_BYTES = 1 << 16  # of a head, of trailers, and of chunk extensions
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class UvicornProtocol(HttpToolsProtocol):
    """Adds three things: whether the parser is between two messages, a bound on bytes that belong to no body, and
    silence towards clients that have disconnected (uvicorn would log a traceback for each).
    """

    between_messages = True
    closing = False  # after the next answer
    outer: Any  # the `FastPathProtocol` that owns it
    _in_head = False
    _unparsed = 0  # bytes that belong to no body and have not completed a message

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        super().data_received(data)
        if self.between_messages:
            self._unparsed = 0
        elif self._unparsed >= MAX_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(TOO_LARGE)
            self.transport.close()

    def handle_websocket_upgrade(self) -> None:
        self.outer.forget()
        super().handle_websocket_upgrade()
        websocket = self.transport.get_protocol()
        if isinstance(websocket, WebSocketProtocol) and websocket.handshake_initiated and not websocket.close_sent:
            stream = FastPathStream(websocket, self.transport)
            self.transport.set_protocol(stream)
            extensions: Any = websocket.scope["extensions"]
            extensions[FAST_PATH] = stream

    def on_message_begin(self) -> None:
        self.between_messages, self._in_head = False, True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are ignored
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._unparsed = False, 0
        super().on_headers_complete()
        if self.closing and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.between_messages = True
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def app_until_disconnect(scope: Any, receive: Any, send: Any) -> None:
            async def send_if_connected(message: Any) -> None:
                if cycle.transport.is_closing():
                    cycle.disconnected = True
                await send(message)

            await app(scope, receive, send_if_connected)

        super()._start_asgi_task(cycle, app_until_disconnect)

    @property
    def is_idle(self) -> bool:
        """Whether the next byte begins a message, and no response is in progress."""
        return self.between_messages and not self.pipeline and (self.cycle is None or self.cycle.response_complete)
