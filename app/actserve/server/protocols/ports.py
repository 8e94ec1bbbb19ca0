"""Ports of a protocol's own listeners, which all workers share."""

from __future__ import annotations

import socket

from actserve.core.errors import UsageError

BACKLOG = 512


def check_free(host: str, port: int, purpose: str) -> None:
    """Raises `UsageError` if another service has the port: the workers, which share it, would not notice."""
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # despite connections in TIME_WAIT
            probe.bind((host, port))
    except OSError as error:
        raise UsageError(f"cannot listen on {host}, port {port} for {purpose}: {error.strerror}") from error


def listen_shared(host: str, port: int, purpose: str) -> socket.socket:
    """A listening socket. Other workers may listen on the same port. Raises `UsageError`."""
    listener = socket.socket(_family(host))
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {host}, port {port} for {purpose}: {error.strerror}") from error
    return listener


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
