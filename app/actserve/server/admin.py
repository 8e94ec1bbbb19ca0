"""Administration: a second application on a loopback port. It requires the administrator's token.

It writes changes to `routing.json`. This worker applies them at once, the others when they next read the file. Each
response describes the policy after the change, as `GET /policies/{name}` of the service does, without the manifest.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict

from actserve.core.errors import Unauthorized, UsageError
from actserve.core.settings import Settings
from actserve.engine.registry import Registry
from actserve.server.http import error_responses as errors
from actserve.store import routing
from actserve.store.local import ModelStore
from actserve.store.routing import Routing, Share, Version

log = logging.getLogger("actserve")

HOST = "127.0.0.1"


class VersionBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Version


def create_admin(registry: Registry, store: ModelStore, token: str) -> FastAPI:
    """The application. Every route requires `Authorization: Bearer <token>`."""

    async def authorise(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Unauthorized("expected Authorization: Bearer with the administrator's token; got none or another")

    async def change(name: str, edit: Callable[..., Routing], *arguments: Any) -> dict[str, Any]:
        await asyncio.to_thread(edit, store, name, *arguments)
        await registry.poll(retry=True)
        return registry.describe(name)

    app = FastAPI(openapi_url=None, dependencies=[Depends(authorise)])
    errors.install(app)

    @app.get("/policies")
    async def list_policies() -> dict[str, Any]:
        return {"policies": [registry.describe(name) for name in registry.names]}

    @app.post("/load")
    async def load() -> dict[str, Any]:
        """Read the store now, and try refused versions again."""
        await registry.poll(retry=True)
        return await list_policies()

    @app.put("/policies/{name}/pin")
    async def pin(name: str, body: VersionBody) -> dict[str, Any]:
        return await change(name, routing.pin, body.version)

    @app.delete("/policies/{name}/pin")
    async def unpin(name: str) -> dict[str, Any]:
        return await change(name, routing.pin, None)

    @app.post("/policies/{name}/rollback")
    async def roll_back(name: str) -> dict[str, Any]:
        """Pin the version before the live one."""
        return await change(name, routing.roll_back, (await registry.get(name)).version)

    @app.put("/policies/{name}/aliases/{alias}")
    async def alias(name: str, alias: str, body: VersionBody) -> dict[str, Any]:
        return await change(name, routing.alias, alias, body.version)

    @app.delete("/policies/{name}/aliases/{alias}")
    async def drop_alias(name: str, alias: str) -> dict[str, Any]:
        return await change(name, routing.alias, alias, None)

    @app.put("/policies/{name}/canary")
    async def canary(name: str, candidate: Share) -> dict[str, Any]:
        return await change(name, routing.canary, candidate.version, candidate.share)

    @app.delete("/policies/{name}/canary")
    async def end_canary(name: str) -> dict[str, Any]:
        return await change(name, routing.canary, None)

    @app.put("/policies/{name}/shadow")
    async def shadow(name: str, body: VersionBody) -> dict[str, Any]:
        return await change(name, routing.shadow, body.version)

    @app.delete("/policies/{name}/shadow")
    async def end_shadow(name: str) -> dict[str, Any]:
        return await change(name, routing.shadow, None)

    return app


def check(settings: Settings) -> None:
    """Check before the first worker starts. Raises `UsageError` if the token is missing or the port is taken."""
    if settings.admin_port is None:
        return
    if settings.admin_token is None:
        raise UsageError("administration needs a token of at least 16 characters: set ACTSERVE_ADMIN_TOKEN")
    try:
        _listen(settings.admin_port).close()
    except OSError as error:
        raise UsageError(f"cannot listen on {HOST}, port {settings.admin_port}: {error.strerror}") from error


@asynccontextmanager
async def serving(registry: Registry, store: ModelStore, settings: Settings) -> AsyncIterator[None]:
    """Serve administration while the service runs, if a port is set and no other worker listens on it."""
    if settings.admin_port is None or settings.admin_token is None:
        yield
        return
    try:
        listener = _listen(settings.admin_port)
    except OSError as error:
        log.info("another worker serves administration: %s", error.strerror)
        yield
        return
    app = create_admin(registry, store, settings.admin_token)
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, server_header=False)
    server = _AdminServer(config)
    task = asyncio.create_task(server.serve([listener]))
    log.info("administration on %s, port %d", HOST, settings.admin_port)
    try:
        yield
    finally:
        server.should_exit = True
        await task


class _AdminServer(uvicorn.Server):
    """Leaves signals to the server of the service."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # despite connections in TIME_WAIT
        listener.bind((HOST, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener
