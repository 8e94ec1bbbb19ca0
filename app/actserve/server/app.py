"""create_app: the composition root. It reads the environment, once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from actserve import __version__
from actserve.core.errors import UsageError
from actserve.core.imports import import_extra
from actserve.core.settings import Settings
from actserve.engine.registry import Registry
from actserve.recording.budget import Budget
from actserve.recording.recorder import Recorder
from actserve.server import admin, protocols
from actserve.server.access import tls
from actserve.server.access.tokens import Access, read_tokens
from actserve.server.admission import Admission
from actserve.server.arcade import browser_bundles, game_routes, page
from actserve.server.arcade.game import GameSlots
from actserve.server.fastpath.act_codec import act_resources
from actserve.server.fastpath.codec import Resources
from actserve.server.fastpath.endpoint import Endpoint
from actserve.server.fastpath.fast_path import FastPath, ResourcesOf
from actserve.server.http import act, error_responses, health, metrics, policies, security, sessions
from actserve.server.http.bounded_turns import BoundedTurnsMiddleware
from actserve.server.http.observability import ObservabilityMiddleware
from actserve.server.http.root_path import RootPathMiddleware
from actserve.server.metrics.publisher import Publisher
from actserve.server.processes.supervisor import Start
from actserve.server.protocols import Protocol, Service
from actserve.server.regions import Regions
from actserve.server.sessions import SessionLimits, Sessions
from actserve.store.remote import open_store
from actserve.store.trust import Trust
from actserve.telemetry.traces import Traces

LOAD_WAIT_S = 2.0  # while other workers serve, a worker loads for this long before it accepts connections


def check(settings: Settings) -> Sequence[Protocol]:
    """Check the settings before the first worker starts. Returns the protocols. Raises `UsageError`."""
    if "://" not in settings.store and not Path(settings.store).is_dir():
        raise UsageError(f"there is no model store at {settings.store}; export a policy first, or name it with --store")
    open_store(settings.store, Trust.load(settings.trust, settings.require_signature))
    if settings.tokens is not None:
        read_tokens(settings.tokens)
    found = protocols.load()
    protocols.check(found, settings)
    admin.check(settings)
    if settings.record is not None:
        import_extra("record", "actserve.recording.writer:prepare")(settings.record)
    tls.check(settings)
    if settings.bundles is not None:
        browser_bundles.check(settings.bundles)
    return found


def fast_protocols(found: Iterable[Protocol], service: Service) -> Sequence[ResourcesOf]:
    """The fast path of `/act`, and those of the protocols."""

    def bound(resources: Callable[[Endpoint, Service], Resources]) -> ResourcesOf:
        return lambda endpoint, _registry, _settings: resources(endpoint, service)

    return act_resources, *(bound(protocol.resources) for protocol in found if protocol.resources is not None)


def install(app: FastAPI, found: Iterable[Protocol]) -> None:
    """Add the routes of the protocols, and the bodies that they recognise at `/act`."""
    for protocol in found:
        for router in protocol.routers:
            app.include_router(router)
    app.state.act_bodies = [protocol.act_bodies for protocol in found if protocol.act_bodies is not None]


def recorder_for(settings: Settings) -> Recorder | None:
    """The recorder that the settings ask for; None: nothing is recorded."""
    if settings.record is None:
        return None
    budget = Budget(settings.record_cpu)
    return Recorder(str(settings.record), budget, settings.record_buffer_bytes, settings.unrecorded)


class _Application(FastAPI):
    """FastAPI with our middleware around everything, error handlers included."""

    def build_middleware_stack(self) -> ASGIApp:
        observed = ObservabilityMiddleware(super().build_middleware_stack())
        return BoundedTurnsMiddleware(RootPathMiddleware(observed, self.state.settings.root_path))


def create_app(
    settings: Settings | None = None, start: Start | None = None, found: Sequence[Protocol] | None = None
) -> FastAPI:
    """The service. Policies load after the start: `/healthz` answers 200 at once, `/readyz` when they are warm.

    `found` are the protocols; None: those of all installed packages. Raises as `protocols.load`.
    """
    settings = settings or Settings.from_environment(os.environ)
    access = None if settings.tokens is None else Access(settings.tokens, settings.workers)
    admission = Admission(settings, access)
    store = open_store(settings.store, Trust.load(settings.trust, settings.require_signature))
    registry = Registry(store, settings)
    recorder = recorder_for(settings)
    if recorder is not None:
        registry.record(recorder)
    found = protocols.load() if found is None else found
    traces = Traces(os.environ)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        limits = SessionLimits(
            settings.max_sessions, settings.max_session_bytes, settings.session_idle_s, settings.max_sessions_per_token
        )
        with ExitStack() as stack:
            if recorder is not None:
                writer = import_extra("record", "actserve.recording.writer:Writer")
                stack.enter_context(writer(recorder, settings.record))
            path = settings.sessions
            if path is None:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="actserve-"))) / "sessions.sqlite"
            app.state.sessions = stack.enter_context(
                Sessions(path, limits, home=settings.session_home, admission=admission)
            )
            regions = app.state.regions = Regions(path.with_name(f"{path.name}.regions"))
            stack.callback(regions.close)
            registry.session_versions = app.state.sessions.versions
            stack.callback(traces.close)
            async with Publisher(
                registry, app.state.sessions, admission.memory, settings.counts, recorder
            ) as app.state.metrics:
                registry.start(start.delay_s if start else 0.0, start.reason if start else "")
                if start and (start.replaces or settings.workers > 1):
                    await registry.wait_loaded(LOAD_WAIT_S)
                try:
                    service = Service(registry, admission, app.state.sessions, settings, regions)
                    resources = fast_protocols(found, service)
                    async with (
                        protocols.serving(found, service),
                        admin.serving(registry, store, settings),
                        FastPath(
                            registry, admission, app.state.sessions, settings, traces.enabled, resources
                        ) as fast_path,
                    ):
                        yield {"fast_path": fast_path}
                finally:
                    await registry.close()

    app = _Application(
        title="actserve",
        version=__version__,
        description="Answers `/act` with the action of a policy trained with TorchRL.",
        lifespan=lifespan,
        telemetry=traces.fastapi_telemetry,
    )
    app.state.settings = settings
    app.state.admission = admission
    app.state.registry = registry
    app.state.game_slots = GameSlots(settings.max_games)
    app.state.traces = traces
    error_responses.install(app)
    security.install(app, admission, settings)
    for routes in (act, sessions, policies, metrics, health, game_routes, browser_bundles, page):
        app.include_router(routes.router)
    if settings.bundles is not None:
        browser_bundles.install(app, settings.bundles)
    install(app, found)
    return app
