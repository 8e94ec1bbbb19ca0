"""`inference.GRPCInferenceService`: the Open Inference Protocol over gRPC. Off unless `grpc_port` is set.

tritonclient has the message classes and stubs; `protocols.oip` handles the requests. The module `server`, which imports
grpc and tritonclient, is imported only if the server is on.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext

from actserve.core.errors import UsageError
from actserve.core.imports import import_extra
from actserve.core.settings import Settings
from actserve.server.protocols import Protocol, Service

SERVING = "actserve.server.protocols.grpc.server:serving"


def serving(service: Service) -> AbstractAsyncContextManager[None]:
    """Serve gRPC while the app runs, if a port is set. Raises `UsageError`."""
    if service.settings.grpc_port is None:
        return nullcontext()
    serve: Callable[[Service], AbstractAsyncContextManager[None]] = import_extra("grpc", SERVING)
    return serve(service)


def check(settings: Settings) -> None:
    """Check before the first worker starts. Raises `UsageError` if the port is taken or the libraries are missing.

    The workers share the port, and would not notice that another service has it.
    """
    if settings.grpc_port is None:
        return
    import_extra("grpc", SERVING)
    family = socket.AF_INET6 if ":" in settings.grpc_host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # despite connections in TIME_WAIT
            probe.bind((settings.grpc_host, settings.grpc_port))
    except OSError as error:
        where = f"{settings.grpc_host}, port {settings.grpc_port}"
        raise UsageError(f"cannot listen on {where} for gRPC: {error.strerror}") from error


protocol = Protocol("Open Inference Protocol over gRPC", serving=serving, check=check)
