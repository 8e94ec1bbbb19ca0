"""uvicorn's WebSocket protocol with five changes. It is uvicorn's `ws` setting.

* Each stream sets its own limit on messages. The limit is checked in the header of a frame, before its payload is read.
* At shutdown uvicorn closes every connection at once, and replies are lost. Here the application gets a disconnect with
  code 1012, queued behind the messages already received. Then the application closes the connection.
* Invalid data right after a handshake closes the connection; uvicorn raises.
* A refusal with a body ends the handshake; uvicorn logs it as an error of the application.
* A client that neither reads nor answers pings is disconnected; closing would wait until it has read the rest.

`disconnected` drops further messages of the application without an error in the log.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

LIMIT = "actserve.limit"  # ASGI extension: `set_max_bytes(max_message_bytes)`
RESTART = 1012  # "service restart" (IANA's registry of close codes)


class WebSocketProtocol(WebSocketsSansIOProtocol):
    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if not self.close_sent:  # otherwise the handshake was refused
            extensions: Any = self.scope["extensions"]
            extensions[LIMIT] = {"set_max_bytes": self._set_max_bytes}

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True

    def receive_binary(self, message: bytes) -> None:
        """Queue a binary message whose frame was read elsewhere."""
        self.curr_msg_data_type, self.frames = "bytes", [message]
        self.send_receive_event_to_app()

    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent:
            self.queue.put_nowait({"type": "websocket.disconnect", "code": RESTART})
        else:
            super().shutdown()
            self.disconnected = True

    def handle_parser_exception(self) -> None:
        if self.conn.close_sent is None:  # invalid data after a handshake that was not answered yet
            self.handshake_complete = self.close_sent = True
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})
            self.transport.close()
        else:
            super().handle_parser_exception()
        self.disconnected = True

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()

    def _set_max_bytes(self, max_message_bytes: int) -> None:
        self.conn.max_message_size = max_message_bytes
