"""Sequences: `sequence_id`, `sequence_start` and `sequence_end` as sessions.

A sequence is a session that the client named: whoever knows a policy and the name shares it, as in Triton. It stays on
the version that it began with.
"""

from __future__ import annotations

from dataclasses import dataclass

from actserve import wire
from actserve.core.errors import InvalidRequest
from actserve.engine.policy import Acted, Policy
from actserve.engine.registry import Registry
from actserve.server.admission import current_token
from actserve.server.protocols.oip.schema import Asked, Parameters
from actserve.server.sessions import Session, Sessions, policy_of


@dataclass(frozen=True)
class Sequence:
    policy: Policy  # that acts: the version that the sequence began with
    session: Session | None  # None: it starts with this request


async def find(
    sessions: Sessions, registry: Registry, parameters: Parameters, policy: Policy, pinned: bool
) -> Sequence | None:
    """The sequence that a request to `policy` names, if it does. `pinned`: it asks for this version and for no other.

    Raises `UnknownSession` for one that was not started, `InvalidRequest` for a start or an end of nothing.
    """
    if not parameters.sequence_id:
        if parameters.sequence_start or parameters.sequence_end:
            raise InvalidRequest(
                f"expected the sequence_id to start or end; got {parameters.sequence_id!r}, which is none"
            )
        return None
    if parameters.sequence_start:
        return Sequence(policy if pinned else registry.route(policy, new_episode=True), None)
    session = sessions.sequence(policy.name, parameters.sequence_id, holder=current_token())
    if pinned and session.version != policy.version:
        raise InvalidRequest(f"a sequence stays on its version: expected {session.version}; got {policy.version}")
    return Sequence(await policy_of(registry, session), session)


async def step(sessions: Sessions, registry: Registry, sequence: Sequence, asked: Asked) -> Acted:
    """One step. When it fails the sequence is where it was, or is none if this was its start."""
    parameters = asked.request.parameters
    exploration, seed = wire.read_randomness(vars(parameters))
    tensors = asked.tensors(sequence.policy.signature)
    session = sequence.session
    if session is None:
        session = sessions.begin(
            sequence.policy.name,
            sequence.policy.version,
            seed=seed,
            exploration=exploration,
            sequence=parameters.sequence_id,
            holder=current_token(),
        )
    elif seed not in (None, session.seed) or exploration not in (None, session.exploration):
        raise InvalidRequest("a sequence's seed and exploration are set when it starts; got others later")
    try:
        stepped = await sessions.step(registry, session, tensors)
    except BaseException:
        if sequence.session is None:
            sessions.end(session)
        raise
    if parameters.sequence_end:
        sessions.end(session)
    return stepped.acted
