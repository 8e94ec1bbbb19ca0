"""Sequences: `sequence_id`, `sequence_start` and `sequence_end` as sessions.

A sequence is a session whose id the client chooses. As in Triton, clients that use the same policy and id share it. It
stays on the version that it began with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from actserve import wire
from actserve.core.errors import InvalidRequest
from actserve.engine.policy import Acted, Policy
from actserve.engine.registry import Registry
from actserve.server import off_loop
from actserve.server.admission import current_token
from actserve.server.protocols.oip.infer_request import Parameters, ReceivedRequest
from actserve.server.sessions import Session, Sessions, policy_of


@dataclass(frozen=True)
class Sequence:
    policy: Policy  # the version that the sequence began with
    session: Session | None  # None: the sequence starts with this request


async def find(
    sessions: Sessions, registry: Registry, parameters: Parameters, policy: Policy, pinned: bool
) -> Sequence | None:
    """The sequence that a request to `policy` names, if any. `pinned`: the client asked for this version of `policy`.

    Raises `UnknownSession` if it was not started, and `InvalidRequest` for a start or end without an id.
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


async def step(
    sessions: Sessions, registry: Registry, sequence: Sequence, received: ReceivedRequest, takes_long: bool
) -> Acted:
    """Take one step. If it fails, the state does not change, and a sequence that started with it does not exist."""
    parameters = received.request.parameters
    exploration, seed = wire.read_randomness(vars(parameters))
    tensors = await off_loop.call(received.tensors, sequence.policy.signature, takes_long=takes_long)
    session = sequence.session
    if session is None:
        begin = partial(
            sessions.begin,
            sequence.policy.name,
            sequence.policy.version,
            seed=seed,
            exploration=exploration,
            sequence=parameters.sequence_id,
            holder=current_token(),
        )
        session = await sessions.when_unlocked(begin)
    elif seed not in (None, session.seed) or exploration not in (None, session.exploration):
        raise InvalidRequest("a sequence's seed and exploration are set when it starts; got others later")
    try:
        result = await sessions.step(registry, session, tensors, door="sequence")
    except BaseException:
        if sequence.session is None:
            await sessions.when_unlocked(partial(sessions.end, session))
        raise
    if parameters.sequence_end:
        await sessions.when_unlocked(partial(sessions.end, session))
    return result.acted
