"""Address: the host and port, or the Unix socket, that the service listens on."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from actserve.core.errors import UsageError

BACKLOG = 2048
# Room for one screen and its head: the kernel can receive a whole request before the event loop reads it. With the
# default of 128 KB, the rest of a request comes later, and with many clients seconds later.
RECEIVE_BUFFER_BYTES = 256 << 10
SO_BUF_LOCK = 72  # since Linux 5.11; Python's socket module lacks it
UDS_MODE = 0o666


@dataclass
class Address:
    """A Unix socket if `path` is set, otherwise a host and a port. `listen` replaces port 0 by a free port."""

    host: str
    port: int
    path: Path | None = None
    shared = False  # whether each worker has its own socket on the port

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def listen(self, count: int) -> list[socket.socket]:
        """A listening socket for each of `count` workers. Raises `UsageError` if another process listens here.

        On a port, each worker has its own socket, and the kernel distributes connections between them. A Unix socket
        is shared by all workers.
        """
        try:
            if self.path is not None:
                return [self._listen_on_path()] * count
            exclusive = self._bind(shared=False)  # fails if another service has the port
            self.port = exclusive.getsockname()[1]
            if count == 1:
                exclusive.listen(BACKLOG)
                return [exclusive]
            exclusive.close()
            self.shared = True
            return [self.listen_again() for _ in range(count)]
        except OSError as error:
            hint = "" if self.path else "; choose another port with --port"
            raise UsageError(f"cannot listen on {self}: {error.strerror or error}{hint}") from error

    def listen_again(self) -> socket.socket:
        """Another socket on the shared port."""
        listener = self._bind(shared=True)
        listener.listen(BACKLOG)
        return listener

    def close(self) -> None:
        if self.path is not None:
            with suppress(FileNotFoundError):
                self.path.unlink()

    def _bind(self, shared: bool) -> socket.socket:
        family, kind, protocol, _, address = socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            with suppress(OSError):
                listener.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, 0)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        return listener

    def _listen_on_path(self) -> socket.socket:
        assert self.path is not None
        listener = socket.socket(socket.AF_UNIX)
        try:
            with suppress(FileNotFoundError):
                if stat.S_ISSOCK(self.path.stat().st_mode):
                    self._remove_stale(self.path)
            listener.bind(str(self.path))
            os.chmod(self.path, UDS_MODE)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener

    @staticmethod
    def _remove_stale(path: Path) -> None:
        """Remove the socket of a service that was killed. Raises `OSError` if a service listens there."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise OSError(0, "another service listens there")
