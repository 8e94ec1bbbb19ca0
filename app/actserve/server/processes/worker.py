"""Worker: one process that serves, as the supervisor starts it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

import uvicorn

from actserve.core.settings import Settings
from actserve.server.app import create_app
from actserve.server.fastpath.acceptor import Acceptor
from actserve.server.processes.supervisor import SIGNALS, Start, Work

GRACE_S = 30  # for what was accepted, once the service is to end


def serving(settings: Settings) -> Work:
    """What a worker does."""
    return partial(_serve, settings)


def _serve(settings: Settings, listener: socket.socket, start: Start) -> None:
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
        timeout_graceful_shutdown=GRACE_S,
    )
    _WorkerServer(config, start).run([listener])


class _WorkerServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, start: Start) -> None:
        super().__init__(config)
        self._start = start

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would end by the signal in the end; here that it was told to end is no failure."""
        for number in SIGNALS:
            signal.signal(number, self.handle_exit)
        yield

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            with suppress(OSError):
                os.write(self._start.pulse, b".")
            self.should_exit = self.should_exit or self._is_orphan()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for _ in range(2):  # who has connected is accepted before the socket is closed
            await asyncio.sleep(0)
        telling = asyncio.create_task(self._tell_the_late(set(self.server_state.connections)))
        await super().shutdown(sockets)
        telling.cancel()

    async def _tell_the_late(self, told: set[Any]) -> None:
        """A connection that was accepted at the last moment is made when the others have been told to close."""
        while True:
            await asyncio.sleep(0.05)
            for connection in self.server_state.connections - told:
                connection.shutdown()
                told.add(connection)

    def _is_orphan(self) -> bool:
        try:
            return os.read(self._start.lifeline, 1) == b""
        except BlockingIOError:
            return False
