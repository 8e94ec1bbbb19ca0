"""An application on a real uvicorn, in a thread of this process, as `actserve serve` sets it up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from tests.waiting import until

UVICORN: dict[str, Any] = {
    "loop": "uvloop",
    "http": "app.lane.protocol:LaneProtocol",
    "ws": "app.api.websocket:WebSocketProtocol",
    "ws_per_message_deflate": False,
    "log_config": None,
}


@contextmanager
def serving(app: FastAPI, **options: Any) -> Iterator[uvicorn.Server]:
    """On a free port; `options` beside or in place of `UVICORN`. Entered once it listens."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, **{**UVICORN, **options}))
    thread = threading.Thread(target=server.run)
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
