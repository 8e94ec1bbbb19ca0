"""`/act`: observations in, actions out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from app import wire
from app.errors import BodyTooLarge, UnknownVersion
from app.policy import Policy
from app.registry import Registry
from app.signature import Exploration

router = APIRouter(tags=["act"])

_DESCRIPTION = """
Post one observation and get the policy's action for it.

* `application/octet-stream`: the raw bytes of the observation, row-major. For an Atari policy that is one RGB screen,
  210x160x3 uint8: 100,800 bytes. k observations back to back are a batch of k.
* State is carried by the client: a recurrent policy's answer has its state; send it back with the next observation.
  Without state, or with `"is_init": true`, an episode begins.
* `application/json`: `{"pixels": nested lists}` or
  `{"pixels": {"dtype": "uint8", "shape": [210, 160, 3], "b64": "..."}}`.

```
curl --data-binary @frame.raw -H 'Content-Type: application/octet-stream' :8000/act
{"action":3}
```
"""
_EXTRA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            wire.RAW: {"schema": {"type": "string", "format": "binary"}},
            wire.JSON: {
                "schema": {"type": "object", "additionalProperties": True},
                "example": {"pixels": {"dtype": "uint8", "shape": [210, 160, 3], "b64": "AAAA..."}},
            },
        },
    },
    "parameters": [
        {
            "name": "outputs",
            "in": "query",
            "schema": {"type": "string"},
            "description": "Which outputs to answer, comma-separated; the action alone by default.",
            "example": "action,action_value",
        },
        {
            "name": "exploration",
            "in": "query",
            "schema": {"type": "string", "enum": ["deterministic", "random"]},
            "description": "Act as trained, or as while training; what the policy can do is in its signature.",
        },
        {
            "name": "seed",
            "in": "query",
            "schema": {"type": "integer", "minimum": 0},
            "description": "The same seed gives the same random actions; without one the answer tells a fresh one.",
        },
    ],
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The action for each observation; `Accept: application/octet-stream` gives its raw bytes.",
        "content": {wire.JSON: {"example": {"action": 3}}, wire.RAW: {}},
    },
    "4XX": {
        "description": "What was expected and what came.",
        "content": {
            wire.JSON: {
                "example": {"error": {"code": "invalid_tensor", "message": "...", "detail": {"name": "pixels"}}}
            }
        },
    },
    503: {"description": "Loading, closing, or too much is waiting; try again after `Retry-After` seconds."},
}


_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def _route(path: str) -> Callable[[_Endpoint], _Endpoint]:
    return router.post(
        path, description=_DESCRIPTION, openapi_extra=_EXTRA, responses=_RESPONSES, response_class=Response
    )


@_route("/act")
async def act(request: Request) -> Response:
    return await _act(request, await _registry(request).get())


@_route("/policies/{name}/act")
async def act_by_name(request: Request, name: str) -> Response:
    return await _act(request, await _registry(request).get(name))


@_route("/policies/{name}/versions/{version}/act")
async def act_by_version(request: Request, name: str, version: str) -> Response:
    registry = _registry(request)
    if not version.isdecimal() or len(version) > 9:
        raise UnknownVersion(name[:80], version, registry.describe(name)["versions"])
    return await _act(request, await registry.get(name, int(version)))


async def _act(request: Request, policy: Policy) -> Response:
    """Decode, ask the policy, encode: what is refused is refused before anything runs."""
    signature = policy.signature
    wanted = signature.select([name for name in request.query_params.get("outputs", "").split(",") if name])
    accept = request.headers.get("accept", "")
    wire.negotiate(accept)
    body = await _read(request, request.app.state.settings.max_body_bytes)
    items = wire.decode(request.headers.get("content-type", ""), body, signature)
    exploration, seed = _randomness(request, items)
    outputs, seed = await policy.act(items.tensors, items.size, exploration, seed)
    answered = {name: outputs[name] for name in (*wanted, *(state.spec.name for state in signature.state))}
    content_type, content = wire.encode(accept, answered, items.batched, seed)
    return Response(content, media_type=content_type)


def _randomness(request: Request, items: wire.Items) -> tuple[Exploration | None, int | None]:
    """What the query says, which any encoding can have, before what the body says."""
    query = request.query_params
    exploration = wire.read_exploration(query["exploration"]) if "exploration" in query else items.exploration
    return exploration, wire.read_seed(query["seed"]) if "seed" in query else items.seed


async def _read(request: Request, limit_bytes: int) -> bytearray:
    """The body, bounded: a declared length is refused before the first byte is read."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes, int(declared))
    body = bytearray()  # writable, so that no runtime has to copy what it is given
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise BodyTooLarge(limit_bytes)
    return body


def _registry(request: Request) -> Registry:
    registry: Registry = request.app.state.registry
    return registry
