"""json-numpy at `POST /act`: arrays as `{"__numpy__": base64, "dtype", "shape"}` in JSON, as for OpenVLA's server.

A body is told from our own JSON by its content: its beginning contains `__numpy__`. It may be encoded twice, as
`{"encoded": "…"}` or as one JSON string; then the answer is, too. The answer is the action alone. It is an object with
names if the observation is in an object `{"observation": …}`, as for GR00T's server, if `outputs` asks for more, or if
the client carries the state. A session holds the state if `X-Session` names one.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pydantic_core
from fastapi import Request
from starlette.responses import Response

from actserve import wire
from actserve.core.errors import MalformedBody
from actserve.core.robot import Resize
from actserve.core.signature import Array, Arrays, Signature
from actserve.engine.policy import Policy
from actserve.server import off_loop
from actserve.server.http import sessions
from actserve.server.http.requests import (
    admission_of,
    read_patience_ns,
    registry_of,
    selected_outputs,
    version_header,
)
from actserve.server.protocols import Protocol, service_of
from actserve.server.protocols.robots import arrays
from actserve.server.protocols.robots.names import NameMap, flatten
from actserve.server.protocols.robots.values import resizes_of, to_tensor
from actserve.server.sessions import signature_of
from actserve.wire import large_json
from actserve.wire.payload import Body, Payload, check_json_size

MARK = "__numpy__"
_MARK = re.compile(MARK.encode())
_FIRST_BYTES = 1 << 20  # a search through the largest body would delay all other requests
_MAX_DEPTH = 32
_MANY_BYTES = 64 << 10  # more take a millisecond or longer to decode
_ENCODED, _OBSERVATION = "encoded", "observation"


class JsonNumpyBodies:
    """The bodies with `__numpy__`."""

    def recognises(self, content_type: str, body: Body) -> bool:
        return wire.media_type_of(content_type) in (wire.JSON, "") and _MARK.search(body, 0, _FIRST_BYTES) is not None

    async def answer(self, request: Request, policy: Policy, version: int | None, body: Body) -> Response:
        takes_long = len(body) > _MANY_BYTES
        document, is_twice = await off_loop.call(parse, body, takes_long=takes_long)
        ignored = service_of(request).settings.ignored

        async def decode(policy: Policy) -> Payload:
            return await off_loop.call(
                _payload, document, policy.signature, ignored, resizes_of(policy), takes_long=takes_long
            )

        act = _step if sessions.SESSION_HEADER in request.headers else _act
        outputs, headers = await act(request, policy, version, decode)
        content = outputs if _OBSERVATION in document or len(outputs) > 1 else next(iter(outputs.values()))
        text = pydantic_core.to_json(content)
        return Response(
            pydantic_core.to_json(text.decode()) if is_twice else text, media_type=wire.JSON, headers=headers
        )


Decode = Callable[[Policy], Awaitable[Payload]]
Answer = tuple[dict[str, Any], dict[str, str]]  # the outputs by name, as JSON; headers


async def _act(request: Request, policy: Policy, version: int | None, decode: Decode) -> Answer:
    """The client carries the state, if there is one."""
    registry = registry_of(request)
    if version is None:
        policy = registry.route(policy)
    signature = policy.signature
    names = (*selected_outputs(request.query_params, signature), *(part.spec.name for part in signature.state))
    tensors = (await decode(policy)).tensors
    exploration, seed = wire.read_randomness(request.query_params)
    acted = await admission_of(request).act(policy, tensors, 1, exploration, seed, read_patience_ns(request))
    if version is None:
        registry.mirror(policy, tensors, 1, exploration, acted)
    return {name: as_json(acted.outputs[name][0]) for name in names}, version_header(policy)


async def _step(request: Request, policy: Policy, version: int | None, decode: Decode) -> Answer:
    """A step of a session."""
    step = await sessions.read_step_request(request, policy, version, request.headers[sessions.SESSION_HEADER])
    names = selected_outputs(request.query_params, signature_of(step.policy, step.session))
    result = await sessions.take_step(request, step, lambda: decode(step.policy))
    headers = sessions.step_headers(result) | version_header(step.policy)
    return {name: as_json(result.acted.outputs[name][0]) for name in names}, headers


def parse(body: Body) -> tuple[dict[str, Any], bool]:
    """The document with NumPy arrays, and whether it was encoded twice. Raises `MalformedBody`."""
    document, is_twice = _load(bytes(body)), False
    if isinstance(document, dict) and document.keys() == {_ENCODED}:
        document = document[_ENCODED]
    if isinstance(document, str):
        document, is_twice = _load(document.encode()), True
    if not isinstance(document, dict):
        raise MalformedBody(f"expected a JSON object, an observation; got {type(document).__name__}")
    found: dict[str, Any] = _decoded(document, _MAX_DEPTH)
    return found, is_twice


def as_json(array: Array) -> dict[str, Any]:
    """An array, (*shape), as json-numpy reads it."""
    data = base64.b64encode(array.tobytes()).decode()
    return {MARK: data, "dtype": array.dtype.str, "shape": array.shape}


def _load(text: bytes) -> Any:
    check_json_size(text)
    try:
        return large_json.load(text)
    except ValueError as error:
        raise MalformedBody(f"expected JSON; got something else: {error}"[:300]) from None


def _decoded(value: Any, depth: int) -> Any:
    """`value` with arrays in place of the objects that are arrays."""
    if not isinstance(value, dict):
        return value
    if MARK in value:
        return _array(value)
    if not depth:
        raise MalformedBody(f"expected objects nested at most {_MAX_DEPTH} deep; got deeper ones")
    return {name: _decoded(inner, depth - 1) for name, inner in value.items()}


def _array(value: Mapping[str, Any]) -> Array:
    try:
        data = base64.b64decode(value[MARK], validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise MalformedBody(f"expected base64 text in {MARK}; got something else") from None
    return arrays.from_bytes(data, value.get("dtype"), value.get("shape"))


def _payload(document: Mapping[str, Any], signature: Signature, ignored: list[str], resizes: Resize) -> Payload:
    """One item, a valid request."""
    specs = {spec.name: spec for spec in signature.request_inputs}
    values = flatten(document)
    tensors: Arrays = {
        known: to_tensor(values[name], specs[known], resizes)
        for name, known in NameMap(list(specs), ignored)(values).items()
    }
    signature.validate_request(tensors)
    return Payload(tensors, batched=False)


protocol = Protocol("json-numpy", act_bodies=JsonNumpyBodies())
