"""Acceptor: accepts all waiting connections at once.

libuv accepts one connection in each iteration of the event loop. Under load an iteration takes up to 50 ms, so new
connections would wait for seconds.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from actserve.server.fastpath.http_protocol import FastPathProtocol

log = logging.getLogger("actserve")

MAX_AT_ONCE = 256  # accepted in one turn, so that open connections do not starve


class Acceptor:
    """uvicorn's protocol factory: after each protocol that it creates, it accepts the connections that wait."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._scheduled = False
        self._making: set[asyncio.Task[None]] = set()

    def __call__(self, **options: Any) -> FastPathProtocol:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._accept, options)
        return FastPathProtocol(**options)

    def _accept(self, options: dict[str, Any]) -> None:
        self._scheduled = False
        for _ in range(MAX_AT_ONCE):
            try:
                accepted, _ = self._listener.accept()
            except OSError:  # no connection waits, or no file descriptors are left, which libuv handles
                return
            making = asyncio.create_task(self._make(accepted, options))
            self._making.add(making)
            making.add_done_callback(self._making.discard)

    @staticmethod
    async def _make(accepted: socket.socket, options: dict[str, Any]) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: FastPathProtocol(**options), accepted, ssl=options["config"].ssl
            )
        except OSError:  # disconnected already, or not TLS
            accepted.close()
        except Exception:
            accepted.close()
            log.exception("a connection could not be accepted")
