"""GR00T's protocol over ZeroMQ: a REQ client, msgpack maps with arrays as .npy. Off unless `gr00t_port` is set.

The module `server`, which imports zmq, is imported only if the protocol is on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext

from actserve.core.imports import import_extra
from actserve.core.settings import Settings
from actserve.server.protocols import Protocol, Service, ports

SERVING = "actserve.server.protocols.robots.gr00t.server:serving"


def serving(service: Service) -> AbstractAsyncContextManager[None]:
    """Serve while the app runs, if a port is set. Raises `UsageError`."""
    if service.settings.gr00t_port is None:
        return nullcontext()
    serve: Callable[[Service], AbstractAsyncContextManager[None]] = import_extra("gr00t", SERVING)
    return serve(service)


def check(settings: Settings) -> None:
    """Raises `UsageError` if the port is taken or pyzmq is missing."""
    if settings.gr00t_port is not None:
        import_extra("gr00t", SERVING)
        ports.check_free(settings.gr00t_host, settings.gr00t_port, "GR00T's protocol")


protocol = Protocol("GR00T", serving=serving, check=check)
