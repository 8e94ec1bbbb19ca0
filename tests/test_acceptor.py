"""Waiting connections are accepted, however busy the others are."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from actserve.server.fastpath.acceptor import Acceptor
from tests import certificates, fastpath_service
from tests.fastpath_service import FAST, request
from tests.serving import BACKLOG

CROWD = 100
LOOKS = 5  # of the loop at its sockets


async def nothing(_scope: Any, _receive: Any, _send: Any) -> None:
    """An application that gets no requests."""


def test_a_crowd_is_accepted_in_a_few_looks() -> None:
    async def look(listener: socket.socket) -> int:
        config, state, loop = uvicorn.Config(nothing), ServerState(), asyncio.get_running_loop()
        config.load()
        accept = Acceptor(listener)
        server = await loop.create_server(
            lambda: accept(config=config, server_state=state, app_state={}, _loop=loop), sock=listener
        )
        for _ in range(LOOKS):
            await asyncio.sleep(0)
        accepted = len(state.connections)
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)
        return accepted

    with ExitStack() as clients:
        listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        for _ in range(CROWD):
            clients.enter_context(socket.create_connection(listener.getsockname()))
        assert uvloop.run(look(listener)) == CROWD


@pytest.mark.parametrize("tls", [False, True])
def test_everybody_of_a_crowd_is_answered(tls: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if tls:
        certificate, key = certificates.make(tmp_path)
        options = {"ssl_certfile": certificate, "ssl_keyfile": key}
        context = ssl.create_default_context(cafile=str(certificate))
    with fastpath_service.running(FAST, **options) as service, ExitStack() as clients:
        crowd = [clients.enter_context(service.connect()) for _ in range(CROWD)]
        if tls:
            crowd = [clients.enter_context(context.wrap_socket(one, server_hostname="127.0.0.1")) for one in crowd]
        for one in crowd:
            one.sendall(request())
        assert all(b'{"action":0}' in one.recv(1 << 16) for one in crowd)


def test_who_speaks_no_tls_is_let_go(tmp_path: Path) -> None:
    certificate, key = certificates.make(tmp_path)
    with (
        fastpath_service.running(FAST, ssl_certfile=certificate, ssl_keyfile=key) as service,
        ExitStack() as clients,
    ):
        crowd = [clients.enter_context(service.connect()) for _ in range(CROWD)]
        for one in crowd:
            one.sendall(request())
        for one in crowd:
            with suppress(ConnectionResetError):
                assert b"action" not in one.recv(1 << 16)
