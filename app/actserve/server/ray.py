"""The service as a Ray Serve application: `serve run actserve.server.ray:app`, or `…:build` with arguments.

Each replica is one process with the whole service of `actserve.server.app`. Ray reads the request before the service
gets it, so the routes answer all requests and the fast path, which is below ASGI, none.

Requests with client-carried state can go to any replica. Sessions are in a file that the replicas of one Ray node
share, and that outlives them. A session's id names its node, and the router sends the session's steps there. HAProxy,
which Ray can use instead of its proxy, knows nothing of nodes: with several, sessions need the proxy.
"""

from __future__ import annotations

import asyncio
import logging.config
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig

from actserve.core.errors import NotServing, UsageError
from actserve.core.settings import PREFIX, Settings
from actserve.engine.registry import Registry
from actserve.server.app import check, create_app
from actserve.server.sessions.ids import HOME_BITS, home_of
from actserve.telemetry import logs

DRAIN_S = 30.0  # for requests in progress, as with `actserve serve`
# Replicas on one host cannot share a port.
PROXY_SETTINGS = ("grpc_port", "gr00t_port", "admin_port", "tls_cert", "tls_key")


class Scale(BaseModel):
    """How many replicas run, and the resources of each. The other arguments are fields of `Settings`."""

    model_config = ConfigDict(frozen=True)

    replicas: int = Field(1, ge=1, description="Replicas; the minimum if `max_replicas` is set.")
    max_replicas: int | None = Field(None, ge=1, description="The maximum; Ray scales the replicas by load.")
    target_requests: float = Field(
        8, gt=0, description="Requests in progress in each replica that autoscaling aims at."
    )
    max_requests: int = Field(
        128, ge=1, description="Requests that a replica handles at a time; more wait at the proxy."
    )
    max_queued: int = Field(1024, ge=1, description="Requests that may wait at each proxy; more are refused with 503.")
    cpus: float = Field(1, ge=0, description="CPUs that Ray reserves for a replica.")


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application. `arguments` are fields of `Scale` and `Settings`. Raises `UsageError`.

    Fields of `Settings` that are not given are read from ACTSERVE_* variables.
    """
    scale, settings = read_arguments(arguments)

    def create() -> FastAPI:
        logging.config.dictConfig(logs.configuration(settings.log_format))
        return create_app(with_node_files(settings))

    max_replicas = scale.replicas
    replicas: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.max_replicas is not None:
        max_replicas = max(scale.replicas, scale.max_replicas)
        autoscaling = AutoscalingConfig(
            min_replicas=scale.replicas,
            max_replicas=max_replicas,
            target_ongoing_requests=scale.target_requests,
        )
        replicas = {"autoscaling_config": autoscaling}
    settings = settings.model_copy(update={"workers": max_replicas})
    if settings.threads is None:  # Ray has promised the other cores to others
        settings = settings.model_copy(update={"threads": max(1, int(scale.cpus))})
    deployment = serve.deployment(
        serve.ingress(create)(Replica),
        name="actserve",
        max_ongoing_requests=scale.max_requests,
        max_queued_requests=scale.max_queued,
        ray_actor_options={"num_cpus": scale.cpus},
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=LoggingConfig(enable_access_log=settings.access_log),
        **routing(os.environ),
        **replicas,
    )
    return deployment.bind()


def routing(environment: Mapping[str, str]) -> dict[str, Any]:
    """The options of the deployment that choose a replica for a request.

    Behind HAProxy, Ray takes no router: HAProxy sends each request straight to a replica, without Python between.
    """
    if environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        return {}
    return {"request_router_config": RequestRouterConfig(request_router_class=SessionRouter)}


app = build  # the usual name in Ray's documentation


def read_arguments(arguments: dict[str, Any]) -> tuple[Scale, Settings]:
    unknown = arguments.keys() - Scale.model_fields.keys() - Settings.model_fields.keys()
    if unknown:
        raise UsageError(f"expected {', '.join([*Scale.model_fields, *Settings.model_fields])}; got {sorted(unknown)}")
    given = {PREFIX + name.upper(): str(value) for name, value in arguments.items() if name in Settings.model_fields}
    try:
        scale = Scale.model_validate({name: arguments[name] for name in arguments.keys() & Scale.model_fields.keys()})
        settings = Settings.from_environment({**os.environ, **given})
    except ValidationError as error:
        raise UsageError(f"expected other arguments: {error}") from None
    refused = [name for name in PROXY_SETTINGS if getattr(settings, name) is not None]
    if refused:
        raise UsageError(f"expected no {', '.join(refused)}: behind Ray Serve, only its proxy listens on ports")
    check(settings)
    return scale, settings.absolute()


def with_node_files(settings: Settings) -> Settings:
    """The settings of a replica, completed with the files that the application's replicas on this Ray node share.

    The files are in the folder of Ray's session, unless the settings name others. If the sessions file belongs to the
    node, session ids carry the node as their home.
    """
    node = ray.get_runtime_context().get_node_id()
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "actserve"
    folder.mkdir(mode=0o700, exist_ok=True)
    name = f"{quote(serve.get_replica_context().app_name, safe='')}-{node}"
    files: dict[str, Any] = {}
    if settings.sessions is None:
        files |= {"sessions": folder / f"{name}.sessions", "session_home": home_of_node(node)}
    if settings.counts is None:
        files |= {"counts": folder / f"{name}.counts"}
    if settings.shared is None:
        files |= {"shared": folder / f"{name}.shared"}
        files["shared"].mkdir(mode=0o700, exist_ok=True)
    return settings.model_copy(update=files)


def home_of_node(node_id: str) -> int:
    """The leading bits of a Ray node's id, which is random."""
    return int(node_id, 16) >> (len(node_id) * 4 - HOME_BITS)


class Replica:
    """The health check of a replica."""

    app: FastAPI  # set by serve.ingress

    async def check_health(self) -> None:
        """As `/readyz`. Waits while the policies load: Ray sends no requests before the first check has passed.

        Raises `NotServing`.
        """
        registry: Registry = self.app.state.registry
        while registry.loading:
            await asyncio.sleep(0.05)
        if reason := registry.not_ready():
            raise NotServing(reason)


class SessionRouter(RequestRouter):
    """Sends a session's requests to its home node, all others to any node: to the less busy of two random replicas.

    If the home has no replica, another one gets the request and refuses it with `SessionElsewhere`.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        session = pending_request.metadata.session_id if pending_request is not None else ""
        home = home_of(session) if session else None
        at_home = [replica for replica in candidate_replicas if home_of_node(replica.node_id) == home]
        candidates = at_home or candidate_replicas
        return [random.sample(candidates, min(2, len(candidates)))]
