"""Handles an infer request. HTTP and gRPC share this; each passes a function that reads and one that writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from actserve import wire
from actserve.core.signature import Arrays, TensorSpec
from actserve.engine.policy import Acted, Policy
from actserve.engine.registry import Registry
from actserve.server import off_loop
from actserve.server.admission import Admission
from actserve.server.protocols.oip import codec, sequences, statistics
from actserve.server.protocols.oip.infer_request import OutputParameters, ReceivedRequest
from actserve.server.sessions import Sessions

_Written = TypeVar("_Written")


@dataclass(frozen=True)
class InferResponse:
    """The outputs and parameters to send back."""

    model_name: str
    model_version: str
    id: str | None  # the request's
    seed: int | None  # of the random noise; None: there was none
    outputs: Arrays  # the requested ones in the requested order, each (B, *shape)
    specs: Mapping[str, TensorSpec]  # of each
    binary: Mapping[str, bool]  # HTTP only: whether an output follows the JSON as bytes
    placed: Mapping[str, OutputParameters]  # HTTP only: outputs in shared memory


async def handle_infer(
    admission: Admission,
    sessions: Sessions,
    registry: Registry,
    policy: Policy,
    pinned: bool,
    read: Callable[[], ReceivedRequest],
    write: Callable[[InferResponse], _Written],
    takes_long: bool,
) -> _Written:
    """Read the request, act, write the response, and count all of it. Raises an `ActserveError`.

    `pinned`: the client asked for this version of `policy`. `takes_long`: the request is so large that the event loop
    must not wait for its reading.
    """
    begun_ns = time.perf_counter_ns()
    try:
        received = await off_loop.call(read, takes_long=takes_long)
        async with Admission.deadline(received.request.parameters.timeout):
            acting, acted, selected = await _act(admission, sessions, registry, policy, pinned, received, takes_long)
        acted_ns = time.perf_counter_ns()
        response = _response(received, acting, acted, selected)
        written = await off_loop.call(write, response, takes_long=wire.writing_takes_long(response.outputs))
    except BaseException:
        statistics.counters_of(policy).fail.add(time.perf_counter_ns() - begun_ns)
        raise
    ended_ns = time.perf_counter_ns()
    statistics.counters_of(acting).succeeded(ended_ns - begun_ns, acted, ended_ns - acted_ns)
    return written


async def _act(
    admission: Admission,
    sessions: Sessions,
    registry: Registry,
    policy: Policy,
    pinned: bool,
    received: ReceivedRequest,
    takes_long: bool,
) -> tuple[Policy, Acted, dict[str, bool]]:
    """The policy that acted, the result, and the outputs to return."""
    parameters = received.request.parameters
    sequence = await sequences.find(sessions, registry, parameters, policy, pinned)
    if sequence:
        selected = codec.select_outputs(received.request, sequence.policy.signature.outputs)
        return sequence.policy, await sequences.step(sessions, registry, sequence, received, takes_long), selected
    if not pinned:
        policy = registry.route(policy)
    selected = codec.select_outputs(received.request, policy.signature.answers)
    tensors = await off_loop.call(received.tensors, policy.signature, takes_long=takes_long)
    size = len(next(iter(tensors.values())))
    exploration, seed = wire.read_randomness(vars(parameters))
    acted = await admission.act(policy, tensors, size, exploration, seed)
    if not pinned:
        registry.mirror(policy, tensors, size, exploration, acted)
    return policy, acted, selected


def _response(received: ReceivedRequest, policy: Policy, acted: Acted, selected: dict[str, bool]) -> InferResponse:
    outputs = {name: acted.outputs[name] for name in selected}
    specs = {spec.name: spec for spec in policy.signature.answers}
    placed = codec.placed_outputs(received.request)
    name, version, id_ = policy.name, str(policy.version), received.request.id
    return InferResponse(name, version, id_, acted.seed, outputs, specs, selected, placed)
