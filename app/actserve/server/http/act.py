"""`/act`: observations in, actions out."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from actserve import wire
from actserve.core.errors import InvalidRequest
from actserve.core.signature import Exploration, Signature, State
from actserve.engine.policy import Acted, Policy
from actserve.server import off_loop
from actserve.server.http import sessions
from actserve.server.http.requests import (
    DEADLINE_HEADER,
    admission_of,
    read_body,
    read_patience_ns,
    registry_of,
    selected_outputs,
    version_header,
)
from actserve.server.sessions import signature_of
from actserve.server.sessions.feedback import DONE_HEADER, REWARD_HEADER
from actserve.wire.payload import Body


class UnvalidatedRoute(APIRoute):
    """Calls the endpoint with the request and the path parameters. FastAPI's validation costs 50 µs a request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            response: Response = await self.endpoint(request, **request.path_params)
            return response

        return handle


router = APIRouter(tags=["act"], route_class=UnvalidatedRoute)

_DESCRIPTION = """
Post one observation and get the policy's action for it.

* `application/octet-stream`: the raw bytes of the observation, row-major. For an Atari policy that is one RGB screen,
  210x160x3 uint8: 100,800 bytes. k observations back to back are a batch of k. The bytes do not say their dtype:
  `application/octet-stream; dtype=uint8` is checked.
* `application/x-npy`: the same as a .npy file, one observation or a batch of them.
* Client-carried state: the answer of a recurrent policy has its state. Send it back with the next observation.
  Without state, or with `"is_init": true`, a new episode begins.
* State held by the service: see `/policies/{name}/sessions`.
* `application/safetensors`: any of the policy's inputs by name, each one item or a batch of them, and the metadata
  `seed`, `exploration` and `session`.
* `application/json`: the same, as `{"pixels": nested lists}` or
  `{"pixels": {"dtype": "uint8", "shape": [210, 160, 3], "b64": "..."}}`.
* `image/png`: one screen, for a policy whose observation is an image.
* `Content-Encoding: zstd` or `gzip` on any of them. A Pong screen is 0.2 KB in zstd.

```
curl --data-binary @frame.raw -H 'Content-Type: application/octet-stream' :8000/act
{"action":3}
```
"""
_BINARY = {"type": "string", "format": "binary"}
_EXTRA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            wire.RAW: {"schema": _BINARY},
            wire.SAFETENSORS: {"schema": _BINARY},
            wire.PNG: {"schema": _BINARY},
            wire.NPY: {"schema": _BINARY},
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
            "description": "The outputs to return, comma-separated; by default only the action.",
            "example": "action,action_value",
        },
        {
            "name": "exploration",
            "in": "query",
            "schema": {"type": "string", "enum": ["deterministic", "random"]},
            "description": "How to choose the action; the policy's signature lists its modes, the default first.",
        },
        {
            "name": "seed",
            "in": "query",
            "schema": {"type": "integer", "minimum": 0},
            "description": "The same seed gives the same random actions. Without one, a random seed is chosen and "
            "returned.",
        },
        {
            "name": "Content-Encoding",
            "in": "header",
            "schema": {"type": "string", "enum": ["zstd", "gzip", "deflate", "identity"]},
            "description": "How the body is compressed.",
        },
        {
            "name": DEADLINE_HEADER,
            "in": "header",
            "schema": {"type": "integer", "minimum": 1, "maximum": 9_999_999},
            "description": "Milliseconds that the request may wait in the queue. A request that has waited longer, or "
            "would, is refused with 503 before it runs.",
        },
        {
            "name": sessions.SESSION_HEADER,
            "in": "header",
            "schema": {"type": "string"},
            "description": "The id of the session that takes this step. The session holds the state.",
        },
        {
            "name": sessions.STEP_HEADER,
            "in": "header",
            "schema": {"type": "integer", "minimum": 1},
            "description": "The step's number: one more than the last. The last number again returns the same answer.",
        },
        {
            "name": REWARD_HEADER,
            "in": "header",
            "schema": {"type": "number"},
            "description": "The reward for the session's last step, for the recording.",
        },
        {
            "name": DONE_HEADER,
            "in": "header",
            "schema": {"type": "boolean"},
            "description": "Whether the session's last step ended an episode of the environment, for the recording.",
        },
    ],
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The action for each observation, in the encoding that `Accept` asks for; JSON by default. "
        f"`{wire.VERSION_HEADER}` is the version that acted.",
        "content": {
            wire.JSON: {"example": {"action": 3}},
            wire.RAW: {"schema": _BINARY},
            wire.SAFETENSORS: {"schema": _BINARY},
        },
    },
    "4XX": {
        "description": "The request is invalid. The message says what was expected and what came.",
        "content": {
            wire.JSON: {
                "example": {"error": {"code": "invalid_tensor", "message": "...", "detail": {"name": "pixels"}}}
            }
        },
    },
    503: {"description": "The service is loading, closing or overloaded. Try again after `Retry-After` seconds."},
}


_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def _route(path: str) -> Callable[[_Endpoint], _Endpoint]:
    return router.post(
        path, description=_DESCRIPTION, openapi_extra=_EXTRA, responses=_RESPONSES, response_class=Response
    )


@_route("/act")
async def act(request: Request) -> Response:
    return await _act(request, await registry_of(request).get())


@_route("/policies/{name}/act")
async def act_by_name(request: Request, name: str) -> Response:
    return await _act(request, await registry_of(request).get(name))


@_route("/policies/{name}/versions/{version}/act")
async def act_by_version(request: Request, name: str, version: str) -> Response:
    policy = await registry_of(request).find(name, version)
    return await _act(request, policy, policy.version)


async def _act(request: Request, policy: Policy, version: int | None = None) -> Response:
    """Decode, act, encode. All checks come before the run. `version` is the one in the URL, if any."""
    body = await read_body(request)
    content_type = request.headers.get("content-type", "")
    for bodies in request.app.state.act_bodies:
        if bodies.recognises(content_type, body):
            response: Response = await bodies.answer(request, policy, version, body)
            return response
    if sessions.SESSION_HEADER in request.headers:
        return await _step(request, policy, version, request.headers[sessions.SESSION_HEADER], body)
    registry = registry_of(request)
    if version is None:
        policy = registry.route(policy)
    items = await _decode(request, body, policy)
    if items.session is not None:
        return await _step(request, policy, version, items.session, body)
    if sessions.STEP_HEADER in request.headers:
        raise InvalidRequest(
            f"{sessions.STEP_HEADER} numbers the steps of a session: expected {sessions.SESSION_HEADER} too; got none"
        )
    names = _output_names(request, policy.signature, policy.signature.state)
    exploration, seed = _randomness(request, items)
    admission, patience_ns = admission_of(request), read_patience_ns(request)
    acted = await admission.act(policy, items.tensors, items.size, exploration, seed, patience_ns)
    if version is None:
        registry.mirror(policy, items.tensors, items.size, exploration, acted)
    return await _respond(request, policy.signature, acted, names, items.batched, version_header(policy))


async def _step(request: Request, policy: Policy, version: int | None, id_: str, body: Body) -> Response:
    """A step of a session of `policy`. The session may have begun with another version."""
    step = await sessions.read_step_request(request, policy, version, id_)
    signature = signature_of(step.policy, step.session)
    names = _output_names(request, signature)
    result = await sessions.take_step(request, step, lambda: _decode(request, body, step.policy))
    headers = sessions.step_headers(result) | version_header(step.policy)
    return await _respond(request, signature, result.acted, names, False, headers)


async def _decode(request: Request, body: Body, policy: Policy) -> wire.Payload:
    content_type = request.headers.get("content-type", "")
    takes_long = wire.takes_long(content_type, body)
    return await off_loop.call(wire.decode, content_type, body, policy.signature, takes_long=takes_long)


def _output_names(request: Request, signature: Signature, state: Sequence[State] = ()) -> list[str]:
    """The names of the outputs to return, and of `state`. Raises `UnknownOutput` or `NotAcceptable`."""
    names = [*selected_outputs(request.query_params, signature), *(part.spec.name for part in state)]
    wire.negotiate(request.headers.get("accept", ""), len(names))
    return names


async def _respond(
    request: Request,
    signature: Signature,
    acted: Acted,
    names: Sequence[str],
    batched: bool,
    headers: dict[str, str],
) -> Response:
    outputs = {name: acted.outputs[name] for name in names}
    accept, takes_long = request.headers.get("accept", ""), wire.writing_takes_long(outputs)
    content_type, content = await off_loop.call(
        wire.encode, accept, outputs, signature.answers, batched, acted.seed, takes_long=takes_long
    )
    return Response(content, media_type=content_type, headers=headers)


def _randomness(request: Request, items: wire.Payload) -> tuple[Exploration | None, int | None]:
    """Exploration and seed from the query, or else from the body."""
    exploration, seed = wire.read_randomness(request.query_params)
    return exploration or items.exploration, items.seed if seed is None else seed
