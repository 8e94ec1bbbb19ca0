"""`/policies/{name}/sessions`: begin, inspect and end sessions. Steps go to the `act` routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pydantic_core
from fastapi import APIRouter, Request
from starlette.responses import Response

from actserve import wire
from actserve.core.completion import choose_exploration
from actserve.core.errors import InvalidRequest, MalformedBody
from actserve.engine.policy import Policy
from actserve.engine.recorders import Feedback
from actserve.server.admission import current_token
from actserve.server.http.requests import read_patience_ns, read_raw_body, registry_of, sessions_of
from actserve.server.sessions import Session, StepResult, chunk_state, policy_of, replayed
from actserve.server.sessions.feedback import DONE_HEADER, REWARD_HEADER, read_feedback
from actserve.server.sessions.recorded import end_recorded
from actserve.server.sessions.step_record import StepRecord

router = APIRouter(tags=["sessions"])

SESSION_HEADER = "X-Session"
STEP_HEADER = "X-Step"
REPLAYED_HEADER = "X-Replayed"
OWNER_HEADER = "X-Owner"
KEY_HEADER = "Idempotency-Key"
_BEGIN_LIMIT_BYTES = 4096
_BEGIN: dict[str, Any] = {
    "requestBody": {
        "content": {wire.JSON: {"schema": {"type": "object"}, "example": {"seed": 7, "exploration": "random"}}}
    },
    "parameters": [
        {
            "name": OWNER_HEADER,
            "in": "header",
            "schema": {"type": "string"},
            "description": "A secret that the client chooses, to list its sessions later. It has no effect if the "
            "service requires tokens: then the token's name owns the sessions.",
        },
        {
            "name": KEY_HEADER,
            "in": "header",
            "schema": {"type": "string", "minLength": 1, "maxLength": 200},
            "description": "A random text of the client. The same text again returns the same session, for a client "
            "whose answer was lost.",
        },
    ],
}


@router.post("/policies/{name}/sessions", status_code=201, openapi_extra=_BEGIN)
async def begin(request: Request, name: str) -> dict[str, Any]:
    """Begin a session: the service keeps the state.

    Send its id as `X-Session` with each observation to `/policies/{name}/act`, and the number of the step (1, 2, ...)
    as `X-Step`. A retried step returns the same answer and does not change the state. The session stays on the version
    that it began with. If the policy plans chunks of actions, `{"chunk": "step"}` gets one action with each step: the
    policy runs once a chunk.
    """
    return await _begin(request, await registry_of(request).begin(name))


@router.post("/policies/{name}/versions/{version}/sessions", status_code=201, openapi_extra=_BEGIN)
async def begin_on_version(request: Request, name: str, version: str) -> dict[str, Any]:
    """Begin a session on this version."""
    return await _begin(request, await registry_of(request).find(name, version))


@router.get("/policies/{name}/sessions")
async def list_sessions(request: Request, name: str) -> dict[str, Any]:
    """The sessions that were begun with this token or, if no token is required, with this `X-Owner`."""
    owner, token = request.headers.get(OWNER_HEADER), current_token()
    if token is None and not owner:
        raise InvalidRequest(f"expected {OWNER_HEADER}, the secret that the sessions were begun with; got none")
    await registry_of(request).get(name)
    return {"sessions": [_describe(request, session) for session in sessions_of(request).owned(name, owner, token)]}


@router.get("/policies/{name}/sessions/{id_}")
async def get_session(request: Request, name: str, id_: str) -> dict[str, Any]:
    """The current state of a session: `step` is the last completed step."""
    return _describe(request, sessions_of(request).get(name, id_, current_token()))


@router.delete("/policies/{name}/sessions/{id_}", status_code=204)
async def end(request: Request, name: str, id_: str) -> Response:
    """End a session. From then on, its id is answered with 410."""
    sessions = sessions_of(request)
    session = sessions.get(name, id_, current_token())
    feedback = _feedback(request)
    if feedback is not None and registry_of(request).recorder is not None:
        policy = await policy_of(registry_of(request), session)
        end_recorded(policy, session, feedback)
    await sessions.when_unlocked(lambda: sessions.end(session))
    return Response(status_code=204)


@dataclass(frozen=True)
class StepRequest:
    """A request to take a step of a session."""

    session: Session
    last: StepRecord
    policy: Policy  # the version that the session began with
    step: int | None  # None: the next one


async def read_step_request(request: Request, policy: Policy, version: int | None, id_: str) -> StepRequest:
    """The step that a request wants of session `id_` of `policy`. `version` is the one in the URL, if any."""
    session, last = sessions_of(request).resume(policy.name, id_, current_token())
    if version is not None and session.version != version:
        raise InvalidRequest(
            f"a session stays on its version: expected {session.version}; got {version}",
            expected=session.version,
            got=version,
        )
    if session.version != policy.version:
        policy = await policy_of(registry_of(request), session)
    return StepRequest(session, last, policy, _read_step(request))


async def take_step(request: Request, step: StepRequest, decode: Callable[[], Awaitable[wire.Payload]]) -> StepResult:
    """Take the step, or return the stored answer if it was taken before: then the body is not decoded."""
    if 0 < step.last.step == step.step:
        return replayed(step.policy, step.session, step.last)
    items = await decode()
    if items.session not in (None, step.session.id):
        raise InvalidRequest(f"{SESSION_HEADER} and the body name different sessions; expected one")
    if items.batched:
        raise InvalidRequest(f"expected one item, as a session takes at each step; got a batch of {items.size}")
    query = request.query_params
    if items.seed is not None or items.exploration is not None or "seed" in query or "exploration" in query:
        raise InvalidRequest("a session's seed and exploration are set when it begins; got another with a step")
    registry, patience_ns = registry_of(request), read_patience_ns(request)
    previous = _feedback(request)
    return await sessions_of(request).step(
        registry, step.session, items.tensors, step.step, patience_ns, previous=previous, last=step.last
    )


def step_headers(result: StepResult) -> dict[str, str]:
    """The headers of the response to a step."""
    return {STEP_HEADER: str(result.step), **({REPLAYED_HEADER: "1"} if result.replayed else {})}


async def _begin(request: Request, policy: Policy) -> dict[str, Any]:
    options = _read_beginning(bytes(await read_raw_body(request, _BEGIN_LIMIT_BYTES)))
    exploration, seed = wire.read_randomness(options)
    choose_exploration(policy.signature, exploration, seed)  # refuse it now, not at the first step
    wants_actions = options.get("chunk") == "step"
    if wants_actions:
        chunk_state.by_action(policy.signature)
    sessions = sessions_of(request)
    begin = partial(
        sessions.begin,
        policy.name,
        policy.version,
        owner=request.headers.get(OWNER_HEADER) or None,
        seed=seed,
        exploration=exploration,
        key=_read_key(request),
        holder=current_token(),
        by_action=wants_actions,
    )
    session = await sessions.when_unlocked(begin)
    return _describe(request, session)


def _read_beginning(body: bytes) -> dict[str, Any]:
    try:
        document = pydantic_core.from_json(body or b"{}")
    except ValueError as error:
        raise MalformedBody(f"expected JSON; got something else: {error}") from None
    known = {"seed", "exploration", "chunk"}
    if not isinstance(document, dict) or document.keys() - known or document.get("chunk") not in (None, "step"):
        expected = 'a JSON object with any of "seed", "exploration" and "chunk": "step"'
        raise MalformedBody(f"expected {expected}; got {document}"[:250])
    return document


def _read_key(request: Request) -> str | None:
    value = request.headers.get(KEY_HEADER)
    if value is not None and not (0 < len(value) <= 200 and all("!" <= character <= "~" for character in value)):
        raise InvalidRequest(f"expected {KEY_HEADER} of 1 to 200 visible ASCII characters; got {value!r}"[:200])
    return value


def _feedback(request: Request) -> Feedback | None:
    return read_feedback(request.headers.get(REWARD_HEADER), request.headers.get(DONE_HEADER))


def _read_step(request: Request) -> int | None:
    value = request.headers.get(STEP_HEADER)
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 19):
        raise InvalidRequest(f"expected {STEP_HEADER} as a whole number; got {value!r}"[:200])
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
        "idle_timeout_s": sessions_of(request).limits.idle_s,
    }
