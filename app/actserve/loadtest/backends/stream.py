"""StreamBackend: each connection is a WebSocket, one message under way at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pydantic_core
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import CONNECTING
from websockets.uri import WebSocketURI, parse_uri

from actserve.client.operations import service_error
from actserve.client.transport import stream_url
from actserve.loadtest.backends.base import Backend, Steps
from actserve.loadtest.connection import LoadConnection, Owner, Parts
from actserve.wire.stream_messages import ReplyCodec


class StreamBackend(Backend):
    def connection(self, owner: Owner) -> LoadConnection:
        return StreamConnection(owner, self._uri, self._replies.offsets[self.signature.action.name], self.authorization)

    async def begin(self, connection: LoadConnection) -> None:
        status, body = await connection.exchange()  # the hello
        if status != 200:
            raise service_error(status, body)
        bodies = self.bodies[1]
        connection.script = Steps(self.turns_of_an_episode(), lambda index, _step: (bodies[index],))

    def read(self, answer: bytes) -> Mapping[str, Any]:
        start = self._replies.offsets[self.signature.action.name]
        return self._replies.unpack(bytes(start) + answer).outputs

    @cached_property
    def _replies(self) -> ReplyCodec:
        return ReplyCodec((self.signature.action,))

    @cached_property
    def _uri(self) -> WebSocketURI:
        query = {"binary": self.bodies[0], "seed": self.drawn}
        return parse_uri(stream_url(self.url, self.description.name, None, query))


class StreamConnection(LoadConnection):
    """A WebSocket. An `exchange` of nothing shakes hands, and is answered with the hello or a refusal.

    The answer to a message is what follows the first `skipped` bytes of its reply, which tell the time; or an error.
    """

    def __init__(self, owner: Owner, uri: WebSocketURI, skipped: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(owner)
        self._headers = headers or {}
        self._protocol = ClientProtocol(uri)
        self._skipped = skipped
        self._opcode = Opcode.BINARY
        self._message = b""

    def data_received(self, data: bytes) -> None:
        protocol = self._protocol
        protocol.receive_data(data)
        for event in protocol.events_received():
            if isinstance(event, Frame):
                self._read(event)
            elif isinstance(event, Response) and event.status_code != 101:
                self._received(event.status_code, bytes(event.body or b""), more=False)
        if self.usable:
            self._flush()
            if protocol.handshake_exc is not None or protocol.close_expected():
                self._close()

    def _send(self, parts: Parts) -> None:
        if self._protocol.state is CONNECTING:
            request = self._protocol.connect()
            request.headers.update(self._headers)
            self._protocol.send_request(request)
        for part in parts:
            self._protocol.send_binary(part)
        self._flush()

    def _flush(self) -> None:
        if parts := self._protocol.data_to_send():
            super()._send(parts)

    def _read(self, frame: Frame) -> None:
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return
        if frame.opcode is not Opcode.CONT:
            self._opcode, self._message = frame.opcode, b""
        self._message += frame.data
        if not frame.fin:
            return
        if self._opcode is Opcode.BINARY:
            self._received(200, self._message[self._skipped :])
        else:
            self._received(_status(self._message), self._message)


def _status(text: bytes) -> int:
    """Of an error in JSON. 200 for what is none, as the hello."""
    try:
        return int(pydantic_core.from_json(text)["status"])
    except (KeyError, TypeError, ValueError):
        return 200
