"""Ports of a protocol's own listeners, which all workers share."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext

from actserve.core.errors import UsageError
from actserve.core.imports import import_extra
from actserve.core.settings import Settings
from actserve.server.protocols import Protocol, Service

BACKLOG = 512


def protocol_with_port(
    name: str, purpose: str, extra: str, listener: str, address: Callable[[Settings], tuple[str, int | None]]
) -> Protocol:
    """A protocol with a port of its own, which is off unless the settings name one.

    `listener` is the "module:function" that serves; it is imported, with the libraries of `extra`, only if it is on.
    `address` gives host and port. Check and start raise `UsageError` if the port is taken or the libraries are missing.
    """

    def serving(service: Service) -> AbstractAsyncContextManager[None]:
        if address(service.settings)[1] is None:
            return nullcontext()
        serve: Callable[[Service], AbstractAsyncContextManager[None]] = import_extra(extra, listener)
        return serve(service)

    def check(settings: Settings) -> None:
        host, port = address(settings)
        if port is not None:
            import_extra(extra, listener)
            check_free(host, port, purpose)

    return Protocol(name, serving=serving, check=check)


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
