"""Chunks in sessions: the actions of the last chunk are a part of the session's state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from actserve.core.errors import InvalidRequest
from actserve.core.signature import IS_INIT, Arrays, Signature, State, TensorSpec
from actserve.engine.policy import Acted

ACTIONS, TAKEN = "chunk.actions", "chunk.taken"  # names that no policy has


@lru_cache(64)
def by_action(signature: Signature) -> Signature:
    """The signature of one step of a session that hands out chunks action by action. Raises `InvalidRequest`."""
    planned, chunk = signature.planned, signature.chunk
    assert chunk is not None
    if chunk.ensemble is not None:
        raise InvalidRequest(
            "expected a policy whose newest chunk counts; this one takes the mean of all chunks, which a session does "
            "not keep: use a stream"
        )
    kept = (TensorSpec(ACTIONS, planned.dtype, planned.shape), TensorSpec(TAKEN, "int64", ()))
    states = (*signature.state, *(State(spec, spec.name) for spec in kept))
    return replace(signature, outputs=(signature.planned_action,), state=states, chunk=None)


async def take_action(signature: Signature, inputs: Arrays, run: Callable[[Arrays], Awaitable[Acted]]) -> Acted:
    """The next action, and the state after it. `run` runs the policy, if `execute` actions were taken of the chunk.

    `inputs` are observations and the session's state, each (1, *shape); the state is empty before the first step.
    """
    assert signature.chunk is not None
    given = dict(inputs)
    actions, taken = given.pop(ACTIONS, None), int(given.pop(TAKEN, np.zeros(1))[0])
    acted = Acted({}, None, 0, 0)
    if actions is None or taken >= signature.chunk.execute or given.get(IS_INIT.name, IS_INIT.zeros(1))[0]:
        acted = await run(given)
        actions, taken = acted.outputs[signature.chunk.output], 0
    state = {part.spec.name: acted.outputs.get(part.spec.name, given.get(part.spec.name)) for part in signature.state}
    after = {name: array for name, array in state.items() if array is not None}
    results = after | {signature.chunk.output: actions[:, taken], ACTIONS: actions, TAKEN: np.array([taken + 1])}
    return replace(acted, outputs=results)
