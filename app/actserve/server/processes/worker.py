"""The main function of a worker process: uvicorn with the fast path."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import uvicorn

from actserve.core.settings import Settings
from actserve.server.app import create_app
from actserve.server.fastpath.acceptor import Acceptor
from actserve.server.processes.supervisor import SIGNALS, Start

DRAIN_S = 30  # at shutdown, for accepted requests


def serve(settings: Settings, listener: socket.socket, start: Start) -> None:
    """Serve on `listener` until a signal comes or the supervisor dies."""
    config = uvicorn.Config(
        create_app(settings, start),
        loop="uvloop",
        http=cast(Any, Acceptor(listener)),
        ws="actserve.server.http.websocket:WebSocketProtocol",
        ws_per_message_deflate=False,
        access_log=False,
        log_config=None,
        server_header=False,
        headers=[("X-Content-Type-Options", "nosniff")],
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=DRAIN_S,
    )
    _WorkerServer(config, start).run([listener])


class _WorkerServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, start: Start) -> None:
        super().__init__(config)
        self._start = start

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again at the end; here the process ends with exit code 0."""
        for number in SIGNALS:
            signal.signal(number, self.handle_exit)
        yield

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            with suppress(OSError):
                os.write(self._start.heartbeat_fd, b".")
            self.should_exit = self.should_exit or self._is_orphan()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for _ in range(2):  # accept the connections that wait before the socket is closed
            await asyncio.sleep(0)
        late = asyncio.create_task(self._shut_down_late(set(self.server_state.connections)))
        await super().shutdown(sockets)
        late.cancel()

    async def _shut_down_late(self, known: set[Any]) -> None:
        """Shut down connections that were accepted last, and appear after uvicorn has shut down the others."""
        while True:
            await asyncio.sleep(0.05)
            for connection in self.server_state.connections - known:
                connection.shutdown()
                known.add(connection)

    def _is_orphan(self) -> bool:
        try:
            return os.read(self._start.lifeline_fd, 1) == b""
        except BlockingIOError:
            return False
