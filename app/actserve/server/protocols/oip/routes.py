"""The routes of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pydantic_core
from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.routing import Match

from actserve.core.errors import MalformedBody, NotServing
from actserve.engine.policy import Policy
from actserve.server.http.requests import read_raw_body, registry_of
from actserve.server.protocols.oip import http, metadata, statistics
from actserve.server.protocols.oip.error_responses import OipRoute, answer
from actserve.telemetry import call

router = APIRouter(tags=["Open Inference Protocol v2"], route_class=OipRoute)

INDEX_LIMIT_BYTES = 4096
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "integer"}}

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def _on_model(method: str, what: str = "") -> Callable[[_Endpoint], _Endpoint]:
    """A route about a model, whose version may be left out."""

    def register(endpoint: _Endpoint) -> _Endpoint:
        for path, parameters in (("", [_NAME]), ("/versions/{version}", [_NAME, _VERSION])):
            router.add_api_route(
                f"/v2/models/{{name}}{path}{what}",
                endpoint,
                methods=[method],
                openapi_extra={"parameters": parameters},
            )
        return endpoint

    return register


@router.get("/v2")
@router.get("/v2/", include_in_schema=False)
async def get_server() -> dict[str, Any]:
    """The server, and the extensions of the protocol that it offers."""
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
    """Every version of every policy and its state; `{"ready": true}` asks for those that are ready."""
    body = await read_raw_body(request, INDEX_LIMIT_BYTES)
    try:
        asked = pydantic_core.from_json(body or b"{}")
    except ValueError as error:
        raise MalformedBody(f"expected JSON; got something else: {error}") from None
    if not isinstance(asked, dict) or asked.get("ready") not in (None, True, False):
        raise MalformedBody(f'expected {{"ready": true or false}}, or nothing; got {asked}'[:200])
    return metadata.index(registry_of(request), asked.get("ready") is True)


@router.get("/v2/models/stats")
async def get_all_statistics(request: Request) -> dict[str, Any]:
    """The statistics of the live version of every policy, as this worker process counted them."""
    return {"model_stats": statistics.describe_live(registry_of(request))}


@_on_model("GET", "/stats")
async def get_statistics(request: Request) -> dict[str, Any]:
    """One policy's statistics, as this worker process counted them."""
    return {"model_stats": [statistics.describe(await _policy(request))]}


@_on_model("GET")
async def get_model(request: Request) -> dict[str, Any]:
    """A policy's versions, inputs and outputs. Everything but the observations may be left out."""
    return metadata.model(await _policy(request), registry_of(request))


@_on_model("GET", "/config")
async def get_config(request: Request) -> dict[str, Any]:
    """The same in the terms of Triton's model configuration."""
    return metadata.config(await _policy(request))


@_on_model("GET", "/ready")
async def model_ready(request: Request) -> dict[str, Any]:
    """200 if it can act; else the reason."""
    return {"name": (await _policy(request)).name, "ready": True}


@_on_model("POST", "/infer")
async def infer_model(request: Request) -> Response:
    """Observations in, actions out; JSON, or binary tensor data after it.

    Parameters: `sequence_id`, `sequence_start`, `sequence_end` (the service holds the state of a sequence), `timeout`
    in microseconds, `binary_data_output`, `seed`, `exploration`. `priority` has no effect: requests are answered in
    turn. Bodies may be compressed, both ways.
    """
    return await http.infer(request, await _policy(request), "version" in request.path_params)


@router.api_route("/v2/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
async def nothing(request: Request) -> Response:
    """Whatever no route above takes: parts of the protocol that are not offered, too."""
    asked = f"{request.method} {request.url.path}"
    fits = [route for route in router.routes if route.matches(request.scope)[0] is Match.PARTIAL]
    allowed = ", ".join(sorted(method for route in fits for method in getattr(route, "methods", ())))
    if allowed:
        call.record_refusal("method_not_allowed")
        return answer(405, f"{asked}: expected {allowed}", {"Allow": allowed})
    call.record_refusal("no_such_route")
    return answer(404, f"{asked}: no such route; the extensions offered are {', '.join(metadata.EXTENSIONS)}")


async def _policy(request: Request) -> Policy:
    """The policy that the path names."""
    path = request.path_params
    return await registry_of(request).find(path["name"], path.get("version"))
