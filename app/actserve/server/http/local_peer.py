"""Whether the client of a request is a process of this host and of the service's own user."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from pathlib import Path

from fastapi import Request

from actserve.core.errors import ForbiddenPeer
from actserve.server.admission import current_token

_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
CONNECTION = "actserve.connection"  # the extension of a scope with the socket
_UCRED = struct.Struct("3i")  # pid, uid, gid (unix(7))


def require_local_peer(request: Request) -> None:
    """Raises `ForbiddenPeer` unless the client is of this host and user: over the Unix socket, or over the loopback
    interface with a token."""
    connection: socket.socket | None = request.scope.get("extensions", {}).get(CONNECTION)
    if connection is None or any(name in request.headers for name in _FORWARDED):
        raise ForbiddenPeer("expected a client of this host; got a request that a proxy has passed on")
    if connection.family == socket.AF_UNIX:
        _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    elif current_token() is None:
        raise ForbiddenPeer("expected a client on the Unix socket, or one with a token; got one without")
    else:
        uid = _uid_of_peer(connection)
    if uid != os.geteuid():
        raise ForbiddenPeer("expected a client of this host and of the service's own user; got another")


def _uid_of_peer(connection: socket.socket) -> int | None:
    """The user of the socket at the other end, as /proc/net has it; None if that is on another host."""
    ours, theirs = connection.getsockname()[:2], connection.getpeername()[:2]
    if not ipaddress.ip_address(theirs[0]).is_loopback:
        return None
    table = Path("/proc/net/tcp" if connection.family == socket.AF_INET else "/proc/net/tcp6")
    wanted = [_as_in_table(theirs), _as_in_table(ours)]
    for line in table.read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == wanted:
            return int(fields[7])
    return None


def _as_in_table(address: tuple[str, int]) -> str:
    """Words of 32 bits in the host's byte order, then the port (proc_net_tcp)."""
    packed = ipaddress.ip_address(address[0]).packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"
