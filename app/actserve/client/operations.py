"""The client's requests and how their answers are read, independent of the HTTP library.

An operation is a generator: it yields a `HttpRequest`, is sent the `HttpResponse`, and returns its result. The
synchronous and the asynchronous client run the same operations.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import numpy as np
import pydantic
import pydantic_core

from actserve import wire
from actserve.client.tensordicts import read_tensordict, wanted_exploration, write_tensordict
from actserve.core.environment import Contract
from actserve.core.errors import EnvironmentMismatch, InvalidRequest, ProxyFailed, ServiceError, UsageError
from actserve.core.robot import Robot
from actserve.core.signature import Array, Arrays, Exploration, Signature, TensorSpec


@dataclass(frozen=True)
class HttpRequest:
    method: str
    path: str
    body: Any = None  # bytes-like
    headers: Mapping[str, str] = field(default_factory=dict)
    idempotent: bool = True  # safe to send again


@dataclass(frozen=True)
class HttpResponse:
    status: int
    content_type: str
    body: bytes
    version: str = ""  # of the policy that acted, if the answer says it


Result = TypeVar("Result")
Operation = Generator[HttpRequest, HttpResponse, Result]


@dataclass(frozen=True)
class PolicyDescription:
    """A service's description of one of its policies."""

    name: str
    version: int
    runtime: str  # "onnx" or "pt2"
    reason: str  # why the service chose this runtime
    signature: Signature
    environment: Contract | None  # a game or a robot

    def check_robot(self, robot: Robot | None) -> None:
        """Raise `EnvironmentMismatch` if a client's robot is not the one that the policy was trained on."""
        if robot is None:
            return
        if not isinstance(self.environment, Robot):
            raise EnvironmentMismatch(
                f"{self.name} was not exported with the description of a robot; the client has one"
            )
        self.environment.check(robot)

    def named_observations(self, observation: Array | Mapping[str, Array]) -> Mapping[str, Array]:
        """See the function `named_observations`."""
        return named_observations(self.name, self.signature, observation)


@dataclass(frozen=True)
class Stepped:
    """The result of a step: outputs and new state by name, and the version that acted."""

    outputs: Arrays
    version: int


@dataclass(frozen=True)
class SessionStep:
    """A step of a session. `number` counts from 1."""

    session: str
    number: int
    by_action: bool = False  # the answer is one action of a chunk
    previous: Mapping[str, str] = field(default_factory=dict)  # headers: the result of the step before


def named_observations(
    policy: str, signature: Signature, observation: Array | Mapping[str, Array]
) -> Mapping[str, Array]:
    """The observation as {name: array}. Raises `UsageError` for a bare array if the policy takes several tensors."""
    if isinstance(observation, Mapping):
        return observation
    names = [spec.name for spec in signature.observations]
    if len(names) > 1:
        raise UsageError(f"{policy} takes {', '.join(names)}: give them by name")
    return {names[0]: observation}


def describe(policy: str | None) -> Operation[PolicyDescription]:
    """Describe `policy`; None: the service's default policy."""
    if policy is None:
        listed = read_json((yield HttpRequest("GET", "/policies")))
        policy = listed.get("default") if isinstance(listed, dict) else None
        if not isinstance(policy, str):
            raise UsageError("the service has no default policy; name one")
    answer = read_json((yield HttpRequest("GET", policy_path(policy))))
    try:
        manifest = answer["manifest"]
        signature = pydantic.TypeAdapter(Signature).validate_python(manifest["signature"])
        environment = pydantic.TypeAdapter(Contract | None).validate_python(manifest.get("environment"))
        return PolicyDescription(
            answer["name"], answer["version"], answer["runtime"], answer["reason"], signature, environment
        )
    except (KeyError, TypeError, AttributeError, pydantic.ValidationError) as error:
        raise unexpected_answer("a policy description that this version of the client can read", error) from error


def act(description: PolicyDescription, observation: Array | Mapping[str, Array]) -> Operation[Any]:
    """The action for one observation (*shape), or the k actions for a batch (k, *shape)."""
    signature = description.signature
    tensors, batched = _items(description.named_observations(observation), signature.observations)
    signature.validate_request(tensors)
    content_type, body = request_body(signature, tensors, batched)
    answer = read_json((yield HttpRequest("POST", act_path(description.name), body, {"Content-Type": content_type})))
    spec = signature.action
    try:
        action = answer[spec.name]
        if type(action) is int and not batched:  # the common case: nothing to convert
            return action
        size = len(next(iter(tensors.values())))
        shape = (size, *spec.shape) if batched else spec.shape  # a batch of one is answered as one item
        return np.asarray(action, spec.numpy_dtype).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise unexpected_answer(f"{spec.name!r} as {spec}", answer) from error


def step(
    description: PolicyDescription,
    tensors: Mapping[str, Array],
    outputs: Sequence[str],
    exploration: Exploration | None = None,
    seed: int | None = None,
    session_step: SessionStep | None = None,
) -> Operation[Stepped]:
    """Any inputs of the signature by name -> the action, `outputs` and the new state by name.

    In a session (`session_step`) the service keeps the state and does not return it. Every input is one item (*shape),
    or every input is a batch (k, *shape); the outputs have the same form.
    """
    signature = description.signature
    items, batched = _items(tensors, signature.request_inputs)
    signature.validate_request(items)
    if session_step is not None and session_step.by_action:
        signature = replace(signature, outputs=(signature.planned_action,))
    names = signature.select(list(dict.fromkeys((signature.action.name, *outputs))))
    given = {spec.name: spec for spec in signature.outputs}
    answered = [given[name] for name in names]
    headers = {"Accept": wire.SAFETENSORS}
    if session_step is None:
        answered += [state.spec for state in signature.state]
    else:
        headers |= {"X-Session": session_step.session, "X-Step": str(session_step.number)}
        headers |= session_step.previous
    if exploration is None and seed is None and items.keys() == {spec.name for spec in signature.observations}:
        headers["Content-Type"], body = request_body(signature, items, batched)
    else:
        headers["Content-Type"] = wire.SAFETENSORS
        body = wire.encode_request(
            wire.SAFETENSORS, wire.Payload(items, batched, exploration, seed), signature.request_inputs
        )
    path = f"{act_path(description.name)}?{urlencode({'outputs': ','.join(names)}, safe=',')}"
    response = _checked((yield HttpRequest("POST", path, body, headers)))
    try:
        answer = wire.decode_answer(response.content_type, response.body, answered)
    except InvalidRequest as error:
        raise unexpected_answer(", ".join(spec.name for spec in answered), error.message) from error
    version = int(response.version) if response.version.isdecimal() else description.version
    return Stepped({name: array if batched else array[0] for name, array in answer.tensors.items()}, version)


def act_on_tensordict(description: PolicyDescription, tensordict: Any) -> Operation[Any]:
    """`tensordict` with the outputs, the new state, and the version that acted. See `RemotePolicy.__call__`."""
    signature = description.signature
    outputs = [spec.name for spec in signature.outputs]
    stepped = yield from step(
        description, read_tensordict(tensordict, signature), outputs, wanted_exploration(signature)
    )
    return write_tensordict(tensordict, stepped.outputs, signature, stepped.version)


def begin_session(
    description: PolicyDescription,
    exploration: Exploration | None,
    seed: int | None,
    owner: str | None,
    key: str,
    chunk: str | None = None,
) -> Operation[str]:
    """Begin a session and return its id. The same `key` again returns the same session."""
    options = {"exploration": exploration, "seed": seed, "chunk": chunk}
    body = pydantic_core.to_json({name: value for name, value in options.items() if value is not None})
    headers = {"Content-Type": wire.JSON, "Idempotency-Key": key, **({"X-Owner": owner} if owner else {})}
    answer = read_json((yield HttpRequest("POST", sessions_path(description.name), body, headers)))
    try:
        return str(answer["session"])
    except (KeyError, TypeError) as error:
        raise unexpected_answer("a session", answer) from error


def result_headers(reward: float | None, done: bool | None) -> dict[str, str]:
    """The headers that tell the result of a session's last step."""
    headers = {} if reward is None else {"X-Reward": repr(float(reward))}
    return headers if done is None else headers | {"X-Done": "true" if done else "false"}


def end_session(
    description: PolicyDescription, session: str, result: Mapping[str, str] | None = None
) -> Operation[None]:
    """End a session. `result` are headers: the result of its last step.

    That it has ended before is no error: the answer to the first request may have been lost.
    """
    path = f"{sessions_path(description.name)}/{quote(session, safe='')}"
    response = yield HttpRequest(
        "DELETE", path, headers={"X-Session": session, **(result or {})}
    )  # a proxy may route by it
    if response.status != 410:
        _checked(response)


def act_path(name: str) -> str:
    return f"{policy_path(name)}/act"


def sessions_path(name: str) -> str:
    return f"{policy_path(name)}/sessions"


def policy_path(name: str) -> str:
    return f"/policies/{quote(name, safe='')}"


def request_body(signature: Signature, tensors: Mapping[str, Array], batched: bool) -> tuple[str, Any]:
    """Observations {name: (k, *shape)} -> (content type, body): raw bytes of a single tensor, else safetensors."""
    if len(signature.observations) > 1:
        payload = wire.Payload(dict(tensors), batched)
        return wire.SAFETENSORS, wire.encode_request(wire.SAFETENSORS, payload, signature.observations)
    (array,), (spec,) = tensors.values(), signature.observations
    # A view: 100 KB of screen are not copied before they are sent.
    return wire.raw_type(spec), spec.to_wire(array).data.cast("B")


def unwrap_action(action: Array) -> Any:
    """An int for a single discrete action, else the array itself."""
    return int(action) if action.ndim == 0 and action.dtype.kind in "iu" else action


def _items(tensors: Mapping[str, Array], specs: Sequence[TensorSpec]) -> tuple[Arrays, bool]:
    """-> ({name: (k, *shape)} row-major, whether it was a batch). Keeps unknown names; validation refuses them."""
    ranks = {spec.name: len(spec.shape) for spec in specs}
    batched = any(np.ndim(array) > ranks[name] for name, array in tensors.items() if name in ranks)
    # Adding a leading axis does not copy row-major arrays; other layouts are copied here.
    return {
        n: np.asarray(as_array(a) if batched else as_array(a)[None], order="C") for n, a in tensors.items()
    }, batched


def as_array(value: Any) -> Array:
    """`value` as an array. One of bfloat16, as of the package ml_dtypes, becomes float32, which has all its values."""
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def service_error(status: int, body: bytes) -> ServiceError:
    """The error in the answer `body`; for a body of another format, a `ServiceError` that quotes it."""
    try:
        document = pydantic_core.from_json(body)
    except ValueError:
        document = body[:200].decode(errors="replace")
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, str):  # the Open Inference Protocol's shape
        return ServiceError(status, "http_error", error)
    if not isinstance(error, dict) or not {"code", "message"} <= error.keys():
        return (ProxyFailed if status >= 500 else ServiceError)(status, "http_error", f"{document}")
    return ServiceError(status, error["code"], error["message"])


def _checked(response: HttpResponse) -> HttpResponse:
    if response.status not in (200, 201, 204):
        raise service_error(response.status, response.body)
    return response


def read_json(response: HttpResponse) -> Any:
    """The JSON body of a successful answer. Raises `ServiceError`."""
    body = _checked(response).body
    try:
        return pydantic_core.from_json(body)
    except ValueError:
        raise unexpected_answer("JSON", body[:200].decode(errors="replace")) from None


def unexpected_answer(expected: str, got: object) -> ServiceError:
    return ServiceError(200, "unintelligible", f"expected {expected}; got {got}"[:500])
