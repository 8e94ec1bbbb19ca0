"""The gRPC server: in the event loop of the app, for as long as the app runs."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from actserve.core.errors import UsageError
from actserve.core.settings import Settings
from actserve.engine.registry import Registry
from actserve.server.admission import Admission
from actserve.server.protocols.grpc.service import InferenceService, handlers
from actserve.server.sessions import Sessions

log = logging.getLogger("actserve")

DRAIN_S = 30.0  # for calls that were accepted; as long as the HTTP side has
ROOM_BYTES = 64 << 10  # for what a message has beside its tensors


@asynccontextmanager
async def serving(
    registry: Registry, sessions: Sessions, settings: Settings, admission: Admission
) -> AsyncIterator[None]:
    """The service on `grpc_host` and `grpc_port`, a port that other processes may share. At the end what was accepted
    is answered. Raises `UsageError` when it cannot listen there."""
    limit_bytes = admission.max_body_bytes + ROOM_BYTES
    server = grpc.aio.server(
        options=[
            # Before and after a message is decompressed.
            ("grpc.max_receive_message_length", limit_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 1),
        ],
        maximum_concurrent_rpcs=settings.max_connections,
    )
    service = InferenceService(registry, sessions, admission)
    server.add_generic_rpc_handlers([handlers(service)])
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
        service.close()
        await server.stop(DRAIN_S)
