"""A stream as any WebSocket client has it."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from actserve.core.signature import Exploration
from tests.fake_policy import Alone
from tests.stream_service import Service

REPLY = struct.Struct("<QIIq")  # step, queue_us, run_us, action
UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    "Sec-WebSocket-Version": "13",
}


def opened(service: Service, query: str = "") -> Any:
    """A context manager: a stream as any WebSocket client has it. The hello is the first message."""
    return connect(service.url.replace("http", "ws") + "/stream" + query, compression=None, proxy=None)


def ask(ws: ClientConnection, message: bytes | str) -> Any:
    ws.send(message)
    return answer(ws)


def answer(ws: ClientConnection) -> Any:
    """(step, action) of a binary reply; the document of another."""
    message = ws.recv(60)
    if isinstance(message, str):
        return json.loads(message)
    step, _, _, action = REPLY.unpack(message)
    return step, action


def raw(x: int) -> bytes:
    return x.to_bytes(8, "little")


def closing(ws: ClientConnection) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed) as closed:
        ws.recv(60)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


def alone(exploration: Exploration | None = None, seed: int = 0, version: int = 1) -> Alone:
    return Alone(version, seed, exploration)
