"""StreamBackend: each connection is a WebSocket with one unanswered message at a time."""

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
from actserve.loadtest.backends.base import Backend, EpisodeSteps
from actserve.loadtest.connection import ConnectionListener, LoadConnection, RequestParts
from actserve.wire.stream_messages import ReplyCodec


class StreamBackend(Backend):
    def connection(self, listener: ConnectionListener) -> LoadConnection:
        skipped_bytes = self._replies.offsets[self.signature.action.name]
        return StreamLoadConnection(listener, self._uri, skipped_bytes, self.authorization)

    async def prepare(self, connection: LoadConnection) -> None:
        status, body = await connection.exchange()  # the hello
        if status != 200:
            raise service_error(status, body)
        bodies = self.bodies[1]
        connection.script = EpisodeSteps(self.episode_keys(), lambda index, _step: (bodies[index],))

    def decode(self, answer: bytes) -> Mapping[str, Any]:
        start = self._replies.offsets[self.signature.action.name]
        return self._replies.unpack(bytes(start) + answer).outputs

    @cached_property
    def _replies(self) -> ReplyCodec:
        return ReplyCodec((self.signature.action,))

    @cached_property
    def _uri(self) -> WebSocketURI:
        query = {"binary": self.bodies[0].partition(";")[0], "seed": self.noise_seed}
        return parse_uri(stream_url(self.url, self.description.name, None, query))


class StreamLoadConnection(LoadConnection):
    """A WebSocket. An `exchange` without parts does the handshake; its answer is the hello or the refusal.

    The answer to a message is its reply without the first `skipped_bytes`, which contain timings, or an error.
    """

    def __init__(
        self,
        listener: ConnectionListener,
        uri: WebSocketURI,
        skipped_bytes: int,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(listener)
        self._headers = headers or {}
        self._protocol = ClientProtocol(uri)
        self._skipped_bytes = skipped_bytes
        self._opcode = Opcode.BINARY
        self._message = b""

    def data_received(self, data: bytes) -> None:
        protocol = self._protocol
        protocol.receive_data(data)
        for event in protocol.events_received():
            if isinstance(event, Frame):
                self._on_frame(event)
            elif isinstance(event, Response) and event.status_code != 101:
                self._on_answer(event.status_code, bytes(event.body or b""), keep_alive=False)
        if self.usable:
            self._flush()
            if protocol.handshake_exc is not None or protocol.close_expected():
                self._close()

    def _send(self, parts: RequestParts) -> None:
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

    def _on_frame(self, frame: Frame) -> None:
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return
        if frame.opcode is not Opcode.CONT:
            self._opcode, self._message = frame.opcode, b""
        self._message += frame.data
        if not frame.fin:
            return
        if self._opcode is Opcode.BINARY:
            self._on_answer(200, self._message[self._skipped_bytes :])
        else:
            self._on_answer(_status(self._message), self._message)


def _status(text: bytes) -> int:
    """The status of an error in JSON; 200 for other messages, such as the hello."""
    try:
        return int(pydantic_core.from_json(text)["status"])
    except (KeyError, TypeError, ValueError):
        return 200
