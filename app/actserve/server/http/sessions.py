"""`/policies/{name}/sessions`: sessions begun, looked at and ended. They are stepped on the `act` routes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pydantic_core
from fastapi import APIRouter, Request
from starlette.responses import Response

from actserve import wire
from actserve.core.completion import choose_exploration
from actserve.core.errors import InvalidRequest, MalformedBody
from actserve.core.signature import Exploration
from actserve.engine.policy import Policy
from actserve.server.admission import current_token
from actserve.server.http.requests import read_patience_ns, read_raw_body, registry_of
from actserve.server.sessions import Session, Sessions, StepResult, policy_of

router = APIRouter(tags=["sessions"])

ID = "X-Session"
STEP = "X-Step"
REPLAYED = "X-Replayed"
OWNER = "X-Owner"
_BEGIN_LIMIT_BYTES = 4096
_BEGIN: dict[str, Any] = {
    "requestBody": {
        "content": {wire.JSON: {"schema": {"type": "object"}, "example": {"seed": 7, "exploration": "random"}}}
    },
    "parameters": [
        {
            "name": OWNER,
            "in": "header",
            "schema": {"type": "string"},
            "description": "A secret of the client's choice, by which it can list its sessions. Where tokens are "
            "needed it has no effect: the token's name owns the sessions.",
        }
    ],
}


@router.post("/policies/{name}/sessions", status_code=201, openapi_extra=_BEGIN)
async def begin(request: Request, name: str) -> dict[str, Any]:
    """Begin a session: the service keeps the state. Send its id as `X-Session` with each observation to
    `/policies/{name}/act`, and the number of the step (1, 2, ...) as `X-Step`: a step that is sent again gets the same
    answer and moves nothing. The session stays on the version that it began with."""
    return await _begin(request, await registry_of(request).begin(name))


@router.post("/policies/{name}/versions/{version}/sessions", status_code=201, openapi_extra=_BEGIN)
async def begin_on_version(request: Request, name: str, version: str) -> dict[str, Any]:
    """The same with a certain version."""
    return await _begin(request, await registry_of(request).find(name, version))


@router.get("/policies/{name}/sessions")
async def list_sessions(request: Request, name: str) -> dict[str, Any]:
    """The sessions that were begun with this token; where none is needed, with this `X-Owner`."""
    owner, token = request.headers.get(OWNER), current_token()
    if token is None and not owner:
        raise InvalidRequest(f"expected {OWNER}, the secret that the sessions were begun with; got none")
    await registry_of(request).get(name)
    return {"sessions": [_describe(request, session) for session in _sessions(request).owned(name, owner, token)]}


@router.get("/policies/{name}/sessions/{id_}")
async def get_session(request: Request, name: str, id_: str) -> dict[str, Any]:
    """One session as it stands: `step` is the last step done."""
    return _describe(request, _sessions(request).get(name, id_, current_token()))


@router.delete("/policies/{name}/sessions/{id_}", status_code=204)
async def end(request: Request, name: str, id_: str) -> Response:
    """End a session. Its id is answered with 410 from now on."""
    sessions = _sessions(request)
    sessions.end(sessions.get(name, id_, current_token()))
    return Response(status_code=204)


@dataclass(frozen=True)
class Stepping:
    """A request that steps a session."""

    session: Session
    policy: Policy  # the version that the session began with
    step: int | None  # None: whatever comes next


async def stepping(request: Request, policy: Policy, version: int | None, id_: str) -> Stepping:
    """What to step, of `policy`. `version` is the one that the URL asks for, if it does."""
    session = _sessions(request).get(policy.name, id_, current_token())
    if version is not None and session.version != version:
        raise InvalidRequest(
            f"a session stays on its version: expected {session.version}; got {version}",
            expected=session.version,
            got=version,
        )
    return Stepping(session, await policy_of(registry_of(request), session), _read_step(request))


async def step(request: Request, to_step: Stepping, decode: Callable[[], wire.Payload]) -> StepResult:
    """Do the step, or find its answer if it was done: then the body, which `decode` reads, does not matter."""
    sessions = _sessions(request)
    if to_step.step == to_step.session.step:  # which can be the last one done
        stored = sessions.stored(to_step.policy, to_step.session, to_step.session.step)
        if stored is not None:
            return stored
    items = decode()
    if items.session not in (None, to_step.session.id):
        raise InvalidRequest(f"{ID} and the body name different sessions; expected one")
    if items.batched:
        raise InvalidRequest(f"expected one item, as a session takes at each step; got a batch of {items.size}")
    query = request.query_params
    if items.seed is not None or items.exploration is not None or "seed" in query or "exploration" in query:
        raise InvalidRequest("a session's seed and exploration are set when it begins; got another with a step")
    registry, patience_ns = registry_of(request), read_patience_ns(request)
    return await sessions.step(registry, to_step.session, items.tensors, to_step.step, patience_ns)


def headers(stepped: StepResult) -> dict[str, str]:
    """What the answer to a step says beside its outputs."""
    return {STEP: str(stepped.step), **({REPLAYED: "1"} if stepped.replayed else {})}


async def _begin(request: Request, policy: Policy) -> dict[str, Any]:
    exploration, seed = _read_beginning(bytes(await read_raw_body(request, _BEGIN_LIMIT_BYTES)))
    choose_exploration(policy.signature, exploration, seed)  # or it would be told with the first step
    session = _sessions(request).begin(
        policy.name,
        policy.version,
        owner=request.headers.get(OWNER) or None,
        seed=seed,
        exploration=exploration,
        holder=current_token(),
    )
    return _describe(request, session)


def _read_beginning(body: bytes) -> tuple[Exploration | None, int | None]:
    try:
        document = pydantic_core.from_json(body or b"{}")
    except ValueError as error:
        raise MalformedBody(f"expected JSON; got something else: {error}") from None
    if not isinstance(document, dict) or document.keys() - {"seed", "exploration"}:
        raise MalformedBody(f'expected a JSON object with "seed", "exploration", both or none; got {document}'[:200])
    return wire.read_randomness(document)


def _read_step(request: Request) -> int | None:
    value = request.headers.get(STEP)
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 19):
        raise InvalidRequest(f"expected {STEP} as a whole number; got {value!r}"[:200])
    return int(value)


def _describe(request: Request, session: Session) -> dict[str, Any]:
    return {
        "session": session.id,
        "policy": session.policy,
        "version": session.version,
        "step": session.step,
        "seed": session.seed,
        "exploration": session.exploration,
        "idle_s": session.idle_s,
        "idle_timeout_s": _sessions(request).limits.idle_s,
    }


def _sessions(request: Request) -> Sessions:
    found: Sessions = request.app.state.sessions
    return found
