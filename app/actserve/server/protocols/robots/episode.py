"""RobotEpisode: one robot's episodes on one policy. Every wire of robots acts through it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from actserve import wire
from actserve.core.errors import ActserveError
from actserve.core.signature import IS_INIT, Arrays
from actserve.engine.policy import Policy
from actserve.server import off_loop
from actserve.server.access.tokens import Token
from actserve.server.admission import Ticket, current_token, name_of
from actserve.server.chunk_steps import chunk_steps
from actserve.server.episode_state import EpisodeState
from actserve.server.http.error_responses import log_if_internal, status_of
from actserve.server.memory import STREAM_BYTES
from actserve.server.protocols import Service
from actserve.server.protocols.robots.names import NameMap, flatten
from actserve.server.protocols.robots.values import MANY_BYTES, encoded_bytes, resizes_of, to_tensor
from actserve.telemetry.counts import Transport

OVERHEAD_BYTES = 1 << 20  # of a message: names, text, and a camera that is ignored
ELEMENT_BYTES = 8  # robots often send float64


@dataclass(frozen=True)
class Step:
    """The result of a step: the outputs by name, each (*shape), and how long it waited and ran."""

    outputs: Arrays
    queue_ns: int
    run_ns: int


class RobotEpisode:
    """The episode of one robot, from `begin` or `reset` on. `close` it.

    A wire calls `step` for an observation, and `refused` for an error that it tells the robot. It may call `admit` for
    each message before it decodes it; otherwise `step` does.
    """

    def __init__(
        self,
        service: Service,
        policy: Policy,
        transport: Transport,
        route: str,
        query: Mapping[str, str],
        token: Token | None,
    ) -> None:
        self._service, self._query = service, query
        self._names = list(query.get("outputs", "").split(",")) if query.get("outputs") else []
        self._tally = service.registry.counts.tally(policy.name, transport, route)
        self._token = token
        self._ticket: Ticket | None = None  # of the message in progress
        self._held = ExitStack()
        self._set(policy)

    @classmethod
    async def begin(
        cls,
        service: Service,
        policy: str | None = None,
        *,
        transport: Transport,
        route: str,
        query: Mapping[str, str] | None = None,
        ticket: Ticket | None = None,
    ) -> RobotEpisode:
        """An episode on the live version of `policy`, by default of the default policy.

        `route` is the template of a URL, or a name, for the metrics. `query` may have `outputs`, `seed`, `exploration`,
        `chunk` and `ahead`, as that of a stream. The episode belongs to the token of `ticket`, by default of the
        request in progress.
        Raises an `ActserveError`.
        """
        token = current_token() if ticket is None else ticket.token
        return cls(service, await service.registry.begin(policy), transport, route, query or {}, token)

    @property
    def policy(self) -> Policy:
        return self._state.policy

    @property
    def steps(self) -> int:
        """Steps since the episode began."""
        return self._state.steps

    @property
    def max_message_bytes(self) -> int:
        """The largest message with an observation."""
        if self._resizes:  # its images may be larger than the inputs
            return self._service.admission.max_body_bytes
        elements = sum(spec.elements for spec in self._signature.request_inputs)
        return min(self._service.admission.max_body_bytes, OVERHEAD_BYTES + ELEMENT_BYTES * elements)

    def admit(self, ticket: Ticket | None = None) -> None:
        """Charge for one message, before it is decoded. Without `ticket`, the token is that of the episode.

        Raises `Unauthorized` or `RateLimited`.
        """
        self._ticket = ticket or Ticket(self._token, memory=self._service.admission.memory)
        self._service.admission.open_message(self._ticket)

    async def step(self, observation: Any, patience_ns: int = 0) -> Step:
        """Act on an observation: names, nested or not, and values as in `values.to_tensor`.

        With `is_init` true among the names, a new episode begins first. If this raises, the state has not changed.
        Raises an `ActserveError`.
        """
        if self._ticket is None:
            self.admit()
        self._ticket = None
        values = flatten(observation)
        begins = values.pop(IS_INIT.name, False)
        tensors = await off_loop.call(self._tensors, values, takes_long=encoded_bytes(values.values()) > MANY_BYTES)
        if _is_true(begins) and self.steps:
            await self.reset()
        acted = await self._state.act(tensors, patience_ns)
        self._tally.answered += 1
        outputs = {name: acted.outputs[name][0] for name in self._outputs}
        return Step(outputs, acted.queue_ns, acted.run_ns)

    async def reset(self) -> None:
        """Begin a new episode, on the version that is live now. Raises an `ActserveError`; then nothing has changed."""
        policy = await self._service.registry.begin(self.policy.name)
        self._set(policy)

    def refused(self, error: ActserveError) -> int:
        """Count an error that the robot is told, and log it if it is internal; returns its HTTP status."""
        log_if_internal(error)
        status = status_of(error)
        self._tally.add(str(status), error.code)
        return status

    def failed(self) -> None:
        """Count a failure of the service itself."""
        self._tally.add("500", "internal")

    def close(self) -> None:
        """Free the state."""
        self._state.close()
        self._held.close()

    def _set(self, policy: Policy) -> None:
        signature = policy.signature
        randomness = wire.read_randomness(self._query)
        client = name_of(self._token)
        state = EpisodeState(policy, self._service.admission, *randomness, door="robot", client=client)
        selected = signature.select(self._names)
        state.chunks = chunk_steps(signature, self._query, self._names)
        held = ExitStack()
        size_bytes = STREAM_BYTES + sum(part.spec.item_bytes for part in signature.state)
        held.enter_context(self._service.admission.memory.taken(size_bytes))
        self._held.close()
        self._held = held
        action = signature.action if state.chunks is None else state.chunks.action
        self.action = action.name
        self._outputs = dict.fromkeys([action.name] if state.chunks else [action.name, *selected])
        self._signature = replace(signature, max_batch=1, state=(), noise=(), is_init=False)
        self._specs = {spec.name: spec for spec in self._signature.request_inputs}
        self._map = NameMap(list(self._specs), self._service.settings.ignored)
        self._resizes = resizes_of(policy)
        self._state = state

    def _tensors(self, values: Mapping[str, Any]) -> Arrays:
        """The tensors of a valid request, each (1, *shape)."""
        found = {
            known: to_tensor(values[name], self._specs[known], self._resizes)
            for name, known in self._map(values).items()
        }
        self._signature.validate_request(found)
        return found


def _is_true(flag: Any) -> bool:
    """A flag as robots send it: a bool, or an array of one. Raises `InvalidTensor`."""
    return bool(to_tensor(flag, IS_INIT)[0]) if flag is not False else False
