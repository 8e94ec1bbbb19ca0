"""`inference.GRPCInferenceService`: the Open Inference Protocol over gRPC. Off unless `grpc_port` is set.

tritonclient has the message classes and stubs; `protocols.oip` handles the requests. The module `server`, which imports
grpc and tritonclient, is imported only if the server is on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext

from actserve.core.imports import import_extra
from actserve.core.settings import Settings
from actserve.server.protocols import Protocol, Service, ports

SERVING = "actserve.server.protocols.grpc.server:serving"


def serving(service: Service) -> AbstractAsyncContextManager[None]:
    """Serve gRPC while the app runs, if a port is set. Raises `UsageError`."""
    if service.settings.grpc_port is None:
        return nullcontext()
    serve: Callable[[Service], AbstractAsyncContextManager[None]] = import_extra("grpc", SERVING)
    return serve(service)


def check(settings: Settings) -> None:
    """Raises `UsageError` if the port is taken or the libraries are missing."""
    if settings.grpc_port is not None:
        import_extra("grpc", SERVING)
        ports.check_free(settings.grpc_host, settings.grpc_port, "gRPC")


protocol = Protocol("Open Inference Protocol over gRPC", serving=serving, check=check)
