"""The routes of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import pydantic_core
from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.routing import Match

from actserve.core.errors import MalformedBody, NotServing
from actserve.engine.policy import Policy
from actserve.server.admission import current_token
from actserve.server.http.local_peer import require_local_peer
from actserve.server.http.requests import read_raw_body, regions_of, registry_of
from actserve.server.protocols.oip import http_infer, metadata, statistics
from actserve.server.protocols.oip.error_responses import OipRoute, message_response
from actserve.server.regions import Region, owner_of
from actserve.telemetry import call

router = APIRouter(tags=["Open Inference Protocol v2"], route_class=OipRoute)

INDEX_LIMIT_BYTES = 4096
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "integer"}}

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def _model_route(method: str, suffix: str = "") -> Callable[[_Endpoint], _Endpoint]:
    """Registers two routes of a model, with and without a version."""

    def register(endpoint: _Endpoint) -> _Endpoint:
        for path, parameters in (("", [_NAME]), ("/versions/{version}", [_NAME, _VERSION])):
            router.add_api_route(
                f"/v2/models/{{name}}{path}{suffix}",
                endpoint,
                methods=[method],
                openapi_extra={"parameters": parameters},
            )
        return endpoint

    return register


@router.get("/v2")
@router.get("/v2/", include_in_schema=False)
async def get_server() -> dict[str, Any]:
    """The name of the server, and the protocol extensions that it supports."""
    return metadata.server()


@router.get("/v2/health/live")
async def live() -> dict[str, bool]:
    """The process is alive."""
    return {"live": True}


@router.get("/v2/health/ready")
async def ready(request: Request) -> dict[str, bool]:
    """Policies are loaded, verified and warm."""
    if reason := registry_of(request).not_ready():
        raise NotServing(reason)
    return {"ready": True}


@router.post("/v2/repository/index")
async def index(request: Request) -> list[dict[str, str]]:
    """Every version of every policy and its state; with `{"ready": true}`, only versions that are ready."""
    body = bytes(await read_raw_body(request, INDEX_LIMIT_BYTES))
    try:
        options = pydantic_core.from_json(body or b"{}")
    except ValueError as error:
        raise MalformedBody(f"expected JSON; got something else: {error}") from None
    if not isinstance(options, dict) or options.get("ready") not in (None, True, False):
        raise MalformedBody(f'expected {{"ready": true or false}}, or nothing; got {options}'[:200])
    return metadata.index(registry_of(request), options.get("ready") is True)


@router.get("/v2/models/stats")
async def get_all_statistics(request: Request) -> dict[str, Any]:
    """The statistics of the live version of every policy, as this worker process counted them."""
    return {"model_stats": statistics.describe_live(registry_of(request))}


@_model_route("GET", "/stats")
async def get_statistics(request: Request) -> dict[str, Any]:
    """One policy's statistics, as this worker process counted them."""
    return {"model_stats": [statistics.describe(await _policy(request))]}


@_model_route("GET")
async def get_model(request: Request) -> dict[str, Any]:
    """A policy's versions, inputs and outputs. All inputs except the observations are optional."""
    return metadata.model(await _policy(request), registry_of(request))


@_model_route("GET", "/config")
async def get_config(request: Request) -> dict[str, Any]:
    """The same as a Triton model configuration."""
    return metadata.config(await _policy(request))


@_model_route("GET", "/ready")
async def model_ready(request: Request) -> dict[str, Any]:
    """200 if the policy can act; otherwise an error with the reason."""
    return {"name": (await _policy(request)).name, "ready": True}


@_model_route("POST", "/infer")
async def infer_model(request: Request) -> Response:
    """Observations in, actions out; as JSON, or as binary tensor data after it.

    Parameters: `sequence_id`, `sequence_start`, `sequence_end` (the service holds the state of a sequence), `timeout`
    in microseconds, `binary_data_output`, `seed`, `exploration`. `priority` has no effect: requests are answered in
    order. Request and response bodies may be compressed.
    """
    return await http_infer.infer(request, await _policy(request), "version" in request.path_params)


@router.get("/v2/systemsharedmemory/status")
@router.get("/v2/systemsharedmemory/region/{region}/status")
async def list_regions(request: Request, region: str | None = None) -> list[dict[str, Any]]:
    """The regions of shared memory that are registered, or one of them."""
    return [asdict(found) for found in regions_of(request).registered(owner_of(current_token()), region)]


@router.post("/v2/systemsharedmemory/region/{region}/register")
async def register_region(request: Request, region: str) -> Response:
    """Register part of a shared memory object: `{"key": "/name", "offset": 0, "byte_size": 100800}`.

    Only clients of this host and of the service's own user may, over the Unix socket or with a token.
    """
    require_local_peer(request)
    body = bytes(await read_raw_body(request, INDEX_LIMIT_BYTES))
    regions_of(request).register(owner_of(current_token()), _read_region(region, body))
    return Response()


@router.post("/v2/systemsharedmemory/unregister")
@router.post("/v2/systemsharedmemory/region/{region}/unregister")
async def unregister_region(request: Request, region: str | None = None) -> Response:
    """Forget one region, or all."""
    require_local_peer(request)
    regions_of(request).unregister(owner_of(current_token()), region)
    return Response()


@router.api_route("/v2/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
async def unknown_route(request: Request) -> Response:
    """All other paths, for example of extensions that are not supported."""
    got = f"{request.method} {request.url.path}"
    routes = [route for route in router.routes if route.matches(request.scope)[0] is Match.PARTIAL]
    allowed = ", ".join(sorted(method for route in routes for method in getattr(route, "methods", ())))
    if allowed:
        call.record_refusal("method_not_allowed")
        return message_response(405, f"{got}: expected {allowed}", {"Allow": allowed})
    call.record_refusal("no_such_route")
    return message_response(404, f"{got}: no such route; the extensions offered are {', '.join(metadata.EXTENSIONS)}")


def _read_region(name: str, body: bytes) -> Region:
    try:
        fields = pydantic_core.from_json(body)
    except ValueError as error:
        raise MalformedBody(f"expected JSON; got something else: {error}") from None
    key = fields.get("key") if isinstance(fields, dict) else None
    numbers = [fields.get("offset", 0), fields.get("byte_size")] if isinstance(key, str) else []
    if not isinstance(key, str) or not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise MalformedBody(f'expected {{"key": text, "offset": number, "byte_size": number}}; got {fields}'[:300])
    return Region(name, key, *numbers)


async def _policy(request: Request) -> Policy:
    """The policy that the path names."""
    path = request.path_params
    return await registry_of(request).find(path["name"], path.get("version"))
