"""The gRPC server. It runs in the event loop of the app."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from actserve.core.errors import UsageError
from actserve.server.protocols import Service
from actserve.server.protocols.grpc.service import InferenceService, handlers

log = logging.getLogger("actserve")

DRAIN_S = 30.0  # for accepted calls, as with HTTP
OVERHEAD_BYTES = 64 << 10  # for the fields of a message that are not tensors


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[None]:
    """Serve on `grpc_host` and `grpc_port`; other workers may share the port. On exit, accepted calls are answered.

    Raises `UsageError` if it cannot listen.
    """
    settings, admission = service.settings, service.admission
    limit_bytes = admission.max_body_bytes + OVERHEAD_BYTES
    server = grpc.aio.server(
        options=[
            # The limit applies before and after decompression.
            ("grpc.max_receive_message_length", limit_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 1),
        ],
        maximum_concurrent_rpcs=settings.max_connections,
    )
    inference = InferenceService(service.registry, service.sessions, admission)
    server.add_generic_rpc_handlers([handlers(inference)])
    host = f"[{settings.grpc_host}]" if ":" in settings.grpc_host else settings.grpc_host
    address = f"{host}:{settings.grpc_port}"
    try:
        if settings.tls_cert is not None and settings.tls_key is not None:
            pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
            server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            server.add_insecure_port(address)
    except RuntimeError as error:
        raise UsageError(f"cannot listen on {address} for gRPC") from error
    await server.start()
    log.info("gRPC on %s", address)
    try:
        yield
    finally:
        inference.close()
        await server.stop(DRAIN_S)
