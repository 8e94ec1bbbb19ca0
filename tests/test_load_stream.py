"""The load generator's WebSocket, against the library's own server without a socket between them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from actserve.loadtest.backends.stream import StreamLoadConnection
from actserve.loadtest.connection import LoadConnection


class Transport:
    """The part of a connection that `StreamLoadConnection` needs; the other end is the library's server."""

    def __init__(self, refusing: bool = False) -> None:
        self.server = ServerProtocol()
        self.refusing = refusing
        self.closed = False
        self.received: list[Any] = []

    def writelines(self, parts: list[bytes]) -> None:
        self.server.receive_data(b"".join(parts))
        for event in self.server.events_received():
            if isinstance(event, Frame):
                self.received.append((event.opcode, bytes(event.data)))
            elif self.refusing:
                self.server.send_response(self.server.reject(503, '{"error":{"code":"busy","message":"come later"}}'))
            else:
                self.server.send_response(self.server.accept(cast(Request, event)))

    def get_extra_info(self, _name: str) -> None: ...

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


class Heard:
    """The listener of a connection."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def on_answer(self, connection: LoadConnection, status: int, body: bytes) -> None:
        self.said.append((status, body))

    def on_lost(self, connection: LoadConnection, unanswered: bool) -> None:
        self.said.append(unanswered)


class Greeting:
    """A script."""

    def next(self) -> tuple[int, list[bytes]]:
        return 0, [b"question"]

    def on_answer(self, status: int) -> bool:
        return True


def test_a_stream_connection_takes_fragments_pings_errors_and_closing() -> None:
    async def scenario() -> None:
        owner, transport = Heard(), Transport()
        connection = StreamLoadConnection(owner, parse_uri("ws://x/stream"), 2)
        connection.connection_made(cast(Any, transport))
        connection.script = Greeting()

        def hear(*frames: Frame) -> None:
            for frame in frames:
                transport.server.send_frame(frame)
            connection.data_received(b"".join(transport.server.data_to_send()))

        hello = asyncio.ensure_future(connection.exchange())
        await asyncio.sleep(0)
        hear(Frame(Opcode.TEXT, b'{"policy": "p"}'))
        assert await hello == (200, b'{"policy": "p"}')
        hear(Frame(Opcode.BINARY, b"..not asked for"))
        assert owner.said == []
        connection.send_next()
        hear(Frame(Opcode.BINARY, b"..ans", fin=False), Frame(Opcode.PING, b"1"), Frame(Opcode.CONT, b"wer"))
        assert owner.said == [(200, b"answer")]
        assert transport.received == [(Opcode.BINARY, b"question"), (Opcode.PONG, b"1")]
        connection.send_next()
        hear(Frame(Opcode.TEXT, b'{"error": {"code": "overloaded"}, "status": 503}'))
        assert owner.said[1] == (503, b'{"error": {"code": "overloaded"}, "status": 503}')
        assert connection.usable
        connection.send_next()
        hear(Frame(Opcode.CLOSE, b"\x03\xf4"))
        assert not connection.usable
        connection.connection_lost(None)
        assert owner.said[2:] == [True]

    asyncio.run(scenario())


def test_a_handshake_that_fails_is_told() -> None:
    async def scenario() -> None:
        transport = Transport(refusing=True)
        connection = StreamLoadConnection(Heard(), parse_uri("ws://x/stream"), 2)
        connection.connection_made(cast(Any, transport))
        refused = asyncio.ensure_future(connection.exchange())
        await asyncio.sleep(0)
        connection.data_received(b"".join(transport.server.data_to_send()))
        assert (await refused)[0] == 503
        assert not connection.usable

        connection = StreamLoadConnection(Heard(), parse_uri("ws://x/stream"), 2)
        connection.connection_made(cast(Any, Transport()))
        garbled = asyncio.ensure_future(connection.exchange())
        await asyncio.sleep(0)
        connection.data_received(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        connection.connection_lost(None)
        with pytest.raises(ConnectionResetError):
            await garbled

    asyncio.run(scenario())
