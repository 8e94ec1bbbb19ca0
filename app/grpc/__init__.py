"""`inference.GRPCInferenceService`: the Open Inference Protocol over gRPC, beside the `/v2` routes.

Off unless `grpc_port` is set. The messages and the stubs are tritonclient's; what a request means is `app.api.oip`'s.
`app.grpc.server`, and with it grpc and tritonclient, is not imported before it is wanted.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext

from app.access import Access
from app.errors import UsageError
from app.lazy import resolve_extra
from app.registry import Registry
from app.sessions import Sessions
from app.settings import Settings

SERVING = "app.grpc.server:serving"
Serving = Callable[[Registry, Sessions, Settings, Access | None], AbstractAsyncContextManager[None]]


def serving(
    registry: Registry, sessions: Sessions, settings: Settings, access: Access | None = None
) -> AbstractAsyncContextManager[None]:
    """The server, for as long as the app runs; nothing where no port is set. Raises `UsageError`."""
    if settings.grpc_port is None:
        return nullcontext()
    serve: Serving = resolve_extra("grpc", SERVING)
    return serve(registry, sessions, settings, access)


def check(settings: Settings) -> None:
    """To be called before the first worker starts: they share the port, and none would find that another service has
    it. Raises `UsageError` when the port is taken or the libraries are not installed."""
    if settings.grpc_port is None:
        return
    resolve_extra("grpc", SERVING)
    family = socket.AF_INET6 if ":" in settings.grpc_host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended are no obstacle
            probe.bind((settings.grpc_host, settings.grpc_port))
    except OSError as error:
        where = f"{settings.grpc_host}, port {settings.grpc_port}"
        raise UsageError(f"cannot listen on {where} for gRPC: {error.strerror}") from error
