"""The main function of a worker process: uvicorn with the fast path."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import uvicorn

from actserve.core.settings import Settings
from actserve.engine.registry import Registry
from actserve.server.app import create_app
from actserve.server.fastpath.acceptor import Acceptor
from actserve.server.processes.supervisor import SIGNALS, Start
from actserve.server.protocols import Protocol

DRAIN_S = 30  # at shutdown, for accepted requests
FAILED_DRAIN_S = 2  # the same if a policy of this worker has failed: its successor waits
SWITCH_S = 0.001  # a thread that decodes a large body gives way to the event loop after so long
FAILED = 70  # exit code


def serve(settings: Settings, protocols: Sequence[Protocol], listener: socket.socket, start: Start) -> None:
    """Serve on `listener` until a signal comes, the supervisor dies, or a policy can no longer act in this process."""
    sys.setswitchinterval(SWITCH_S)
    app = create_app(settings, start, protocols)
    config = uvicorn.Config(
        app,
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
        timeout_keep_alive=cast(int, settings.keep_alive_s),  # uvicorn takes any number
        timeout_graceful_shutdown=DRAIN_S,
    )
    registry: Registry = app.state.registry
    _WorkerServer(config, start, registry).run([listener])
    if registry.failed:
        sys.exit(FAILED)


class _WorkerServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, start: Start, registry: Registry) -> None:
        super().__init__(config)
        self._start = start
        self._registry = registry

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
            if self._registry.failed:
                self.config.timeout_graceful_shutdown = FAILED_DRAIN_S
                self.should_exit = True
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
