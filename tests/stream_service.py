"""A real uvicorn with all routes over a policy of a few lines of numpy, in a thread of this process."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from actserve.core.settings import Settings
from actserve.core.signature import Array
from actserve.engine.recorders import ServiceRecorder
from actserve.server.access.tokens import Access
from actserve.server.admission import Admission
from actserve.server.app import fast_protocols, install
from actserve.server.fastpath.fast_path import FastPath
from actserve.server.http import act, policies, security, sessions
from actserve.server.http import error_responses as errors
from actserve.server.memory import Memory
from actserve.server.protocols import Service as ProtocolService
from actserve.server.protocols import load
from actserve.server.regions import Regions
from actserve.server.sessions import SessionLimits, Sessions
from tests.fake_policy import QUICK, SLOW, Versions
from tests.serving import port_of, serving


def application(settings: Settings, registry: Versions) -> FastAPI:
    admission = Admission(settings, None if settings.tokens is None else Access(settings.tokens))
    found = load()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        registry.publish()
        with (
            tempfile.TemporaryDirectory() as folder,
            Sessions(Path(folder) / "sessions.sqlite", SessionLimits(), admission=admission) as held,
        ):
            _app.state.sessions = held
            regions = _app.state.regions = Regions(Path(folder) / "regions")
            resources = fast_protocols(found, ProtocolService(registry, admission, held, settings, regions))
            async with FastPath(registry, admission, held, settings, protocols=resources) as fast_path:
                yield {"fast_path": fast_path}
            await registry.close()

    app = FastAPI(lifespan=lifespan)
    app.state.settings = settings
    app.state.admission = admission
    app.state.registry = registry
    errors.install(app)
    security.install(app, admission, settings)
    for routes in (act, sessions, policies):
        app.include_router(routes.router)
    install(app, found)
    return app


@dataclass(frozen=True)
class Service:
    url: str
    server: uvicorn.Server
    registry: Versions

    def drain(self) -> None:
        """Stop as at SIGTERM."""
        self.server.should_exit = True

    @property
    def connections(self) -> set[Any]:
        return self.server.server_state.connections

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        return self.server.server_state.tasks

    @property
    def memory(self) -> Memory:
        app: Any = self.server.config.app
        memory: Memory = app.state.admission.memory
        return memory

    def publish(self) -> None:
        """Make a further version live."""

        async def publish() -> None:
            self.registry.publish()

        loop = self.registry.policies[1].batcher._loop
        asyncio.run_coroutine_threadsafe(publish(), loop).result(60)

    def hold(self, version: int = 1) -> threading.Event:
        """Every step waits until the event that this gives is set; the event loop does not, if the service is slow."""
        runtime = self.registry.runtimes[version]
        run, gate = runtime._run, threading.Event()

        def wait_and_run(arrays: list[Array]) -> list[Array]:
            assert gate.wait(60)
            return run(arrays)

        # Replaced on this one object, which mypy forbids for methods: other versions go on.
        runtime._run = wait_and_run  # type: ignore[method-assign]
        return gate


@contextmanager
def running(
    settings: Settings | None = None, slow: bool = False, recorder: ServiceRecorder | None = None, **options: Any
) -> Iterator[Service]:
    registry = Versions(SLOW if slow else QUICK)
    if recorder is not None:
        registry.record(recorder)
    # Replaced on this one object, which mypy forbids for methods: the policies are there from the start.
    registry.not_ready = lambda: None  # type: ignore[method-assign]
    app = application(settings or Settings(), registry)
    with serving(app, **options) as server:
        url = "http://localhost" if "uds" in options else f"http://127.0.0.1:{port_of(server)}"
        yield Service(url, server, registry)
