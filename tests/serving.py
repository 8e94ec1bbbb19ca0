"""An application on a real uvicorn, in a thread of this process, as `actserve serve` sets it up."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from actserve.server.fastpath.acceptor import Acceptor
from tests.waiting import until

BACKLOG = 512
UVICORN: dict[str, Any] = {
    "loop": "uvloop",
    "ws": "actserve.server.http.websocket:WebSocketProtocol",
    "ws_per_message_deflate": False,
    "log_config": None,
}


@contextmanager
def serving(app: FastAPI, uds: str | None = None, **options: Any) -> Iterator[uvicorn.Server]:
    """On a free port, or at `uds`; `options` beside or in place of `UVICORN`. Entered once it listens."""
    listener = socket.socket(socket.AF_INET if uds is None else socket.AF_UNIX)
    listener.bind(("127.0.0.1", 0) if uds is None else uds)
    listener.listen(BACKLOG)
    server = uvicorn.Server(uvicorn.Config(app, **{**UVICORN, "http": Acceptor(listener), **options}))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def port_of(server: uvicorn.Server) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port
