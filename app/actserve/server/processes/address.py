"""Address: where the service listens: a host and a port, or a Unix socket."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from actserve.core.errors import UsageError

BACKLOG = 2048
# A screen and its head fit into what the kernel takes in before the loop looks (with its default of 128 KB they do not:
# the rest of each comes later, and of a crowd's some come seconds later). More than that is the kernel's choice again.
RECEIVE_BUFFER_BYTES = 256 << 10
SO_BUF_LOCK = 72  # Linux 5.11; not in Python's socket
UDS_MODE = 0o666


@dataclass
class Address:
    """`path`: of a Unix socket; then the rest does not matter. Port 0 becomes a free one."""

    host: str
    port: int
    path: Path | None = None
    shared = False  # each worker has a socket of its own

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def listen(self, count: int) -> list[socket.socket]:
        """A socket for each of `count` workers. Raises `UsageError` when somebody else listens here.

        On a port the system deals connections out between them; a Unix socket they have in common.
        """
        try:
            if self.path is not None:
                return [self._listen_on_path()] * count
            alone = self._bind(shared=False)  # or it would share the port with another service
            self.port = alone.getsockname()[1]
            if count == 1:
                alone.listen(BACKLOG)
                return [alone]
            alone.close()
            self.shared = True
            return [self.listen_once_more() for _ in range(count)]
        except OSError as error:
            hint = "" if self.path else "; choose another port with --port"
            raise UsageError(f"cannot listen on {self}: {error.strerror or error}{hint}") from error

    def listen_once_more(self) -> socket.socket:
        """One socket more on the port."""
        made = self._bind(shared=True)
        made.listen(BACKLOG)
        return made

    def close(self) -> None:
        if self.path is not None:
            with suppress(FileNotFoundError):
                self.path.unlink()

    def _bind(self, shared: bool) -> socket.socket:
        family, kind, protocol, _, where = socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            with suppress(OSError):
                made.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, 0)
            if shared:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            made.bind(where)
        except OSError:
            made.close()
            raise
        return made

    def _listen_on_path(self) -> socket.socket:
        assert self.path is not None
        made = socket.socket(socket.AF_UNIX)
        try:
            with suppress(FileNotFoundError):
                if stat.S_ISSOCK(self.path.stat().st_mode):
                    self._clear(self.path)
            made.bind(str(self.path))
            os.chmod(self.path, UDS_MODE)
            made.listen(BACKLOG)
        except OSError:
            made.close()
            raise
        return made

    @staticmethod
    def _clear(path: Path) -> None:
        """Take away what a service left that was killed. Raises `OSError` if one listens."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise OSError(0, "another service listens there")
