"""uvicorn's WebSocket protocol, mended where a stream needs it: to be named as its `ws`.

* A stream sets its own bound on messages, which is enforced on a frame's head, before its payload is taken in.
* At shutdown uvicorn closes every connection at once, and the answer on its way is lost. Here the application is told
  first, by a disconnect with code 1012 that queues behind the messages already taken in; the application closes.
* Nonsense that follows a handshake at once closes the connection; uvicorn would fail on it.
* A refusal with a body ends the handshake; uvicorn would log it as an error of the application.
* A peer that neither reads nor answers pings is dropped; closing would wait for it to read the rest.

`disconnected` makes the application's further messages go nowhere without an error in the log.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

LIMIT = "actserve.limit"  # the extension in an ASGI scope: `bound(max_message_bytes)`
RESTART = 1012  # "service restart" (IANA's registry of close codes)


class WebSocketProtocol(WebSocketsSansIOProtocol):
    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if not self.close_sent:  # else it was no handshake, and has been refused
            extensions: Any = self.scope["extensions"]
            extensions[LIMIT] = {"bound": self._bound}

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True

    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent:
            self.queue.put_nowait({"type": "websocket.disconnect", "code": RESTART})
        else:
            super().shutdown()
            self.disconnected = True

    def handle_parser_exception(self) -> None:
        if self.conn.close_sent is None:  # nonsense behind a handshake that has not been answered
            self.handshake_complete = self.close_sent = True
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})
            self.transport.close()
        else:
            super().handle_parser_exception()
        self.disconnected = True

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()

    def _bound(self, max_message_bytes: int) -> None:
        self.conn.max_message_size = max_message_bytes
