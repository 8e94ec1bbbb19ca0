"""An infer request, from what came to what goes out: what HTTP and gRPC share. Each has its way to read and write."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from actserve import wire
from actserve.core.signature import Arrays
from actserve.engine.policy import Acted, Policy
from actserve.engine.registry import Registry
from actserve.server.admission import Admission
from actserve.server.protocols.oip import codec, metadata, sequences, statistics
from actserve.server.protocols.oip.schema import Asked
from actserve.server.sessions import Sessions

_Written = TypeVar("_Written")


@dataclass(frozen=True)
class InferResponse:
    """What there is to say."""

    model_name: str
    model_version: str
    id: str | None  # the request's
    seed: int | None  # what anything random came from
    outputs: Arrays  # those asked for, in that order, each (B, *shape)
    binary: Mapping[str, bool]  # whether an output is to follow the JSON; of HTTP only


async def answer(
    admission: Admission,
    sessions: Sessions,
    registry: Registry,
    policy: Policy,
    pinned: bool,
    read: Callable[[], Asked],
    write: Callable[[InferResponse], _Written],
) -> _Written:
    """Read the request, act, write the answer, count all of it. `pinned`: the version of `policy` was asked for, and
    no other. Raises an `ActserveError`."""
    begun_ns = time.perf_counter_ns()
    try:
        asked = read()
        async with Admission.deadline(asked.request.parameters.timeout):
            acting, acted, selected = await _act(admission, sessions, registry, policy, pinned, asked)
        acted_ns = time.perf_counter_ns()
        written = write(_answer(asked, acting, acted, selected))
    except BaseException:
        statistics.of(policy).fail.add(time.perf_counter_ns() - begun_ns)
        raise
    ended_ns = time.perf_counter_ns()
    statistics.of(acting).succeeded(ended_ns - begun_ns, acted, ended_ns - acted_ns)
    return written


async def _act(
    admission: Admission, sessions: Sessions, registry: Registry, policy: Policy, pinned: bool, asked: Asked
) -> tuple[Policy, Acted, dict[str, bool]]:
    """Which policy acted, how, and which of its outputs to answer."""
    parameters = asked.request.parameters
    sequence = await sequences.find(sessions, registry, parameters, policy, pinned)
    if sequence:
        selected = codec.select(asked.request, sequence.policy.signature.outputs)
        return sequence.policy, await sequences.step(sessions, registry, sequence, asked), selected
    if not pinned:
        policy = registry.route(policy)
    selected = codec.select(asked.request, metadata.outputs(policy.signature))
    tensors = asked.tensors(policy.signature)
    size = len(next(iter(tensors.values())))
    exploration, seed = wire.read_randomness(vars(parameters))
    acted = await admission.act(policy, tensors, size, exploration, seed)
    if not pinned:
        registry.mirror(policy, tensors, size, exploration, acted)
    return policy, acted, selected


def _answer(asked: Asked, policy: Policy, acted: Acted, selected: dict[str, bool]) -> InferResponse:
    outputs = {name: acted.outputs[name] for name in selected}
    return InferResponse(policy.name, str(policy.version), asked.request.id, acted.seed, outputs, selected)
