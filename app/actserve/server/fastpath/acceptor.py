"""Acceptor: connections are taken in as they come, not one for each time that the loop looks at its sockets.

libuv accepts one, then attends to every other socket. Under load that is work for 50 ms, and who comes new would wait
for seconds behind those that have their connection.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from actserve.server.fastpath.http_protocol import FastPathProtocol

AT_ONCE = 256  # those who have a connection wait for no more


class Acceptor:
    """What uvicorn makes protocols by; once one has been made, those who wait behind it are accepted, too."""

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
        for _ in range(AT_ONCE):
            try:
                accepted, _ = self._listener.accept()
            except OSError:  # nobody waits; or there are no descriptors left, which libuv knows how to bear
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
        except OSError:  # gone already, or no TLS
            accepted.close()
