"""RobotEpisode: one robot's episodes on one policy. Every wire of robots acts through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actserve.core.errors import ActserveError
from actserve.core.signature import IS_INIT, Arrays, TensorSpec
from actserve.engine.policy import Policy
from actserve.server import off_loop
from actserve.server.access.tokens import Token
from actserve.server.admission import Ticket, current_token
from actserve.server.episode_state import EpisodeState, Step
from actserve.server.protocols import Service
from actserve.server.protocols.robots.names import NameMap, flatten
from actserve.server.protocols.robots.values import MANY_BYTES, encoded_bytes, resizes_of, to_tensor
from actserve.telemetry.counts import Transport

OVERHEAD_BYTES = 1 << 20  # of a message: names, text, and a camera that is ignored
ELEMENT_BYTES = 8  # robots often send float64


class RobotEpisode:
    """The episode of one robot, from `begin` or `reset` on. `close` it.

    For each message a wire calls `admit` before it decodes it, `step` for an observation, and `refused` for an error
    that it tells the robot. The loop of WebSockets calls `admit` and `refused` itself.
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
        self._service, self._query, self._token = service, query, token
        self._tally = service.registry.counts.tally(policy.name, transport, route)
        self.state = self._begin(policy)

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
        return self.state.policy

    @property
    def action(self) -> str:
        """The name of the action among the outputs."""
        return self.state.action.name

    def admit(self, ticket: Ticket) -> None:
        """Charge for one message, before it is decoded. Raises `Unauthorized` or `RateLimited`."""
        self.state.open_message(ticket)

    async def step(self, observation: Any, patience_ns: int = 0) -> Step:
        """Act on an observation: names, nested or not, and values as in `values.to_tensor`.

        With `is_init` true among the names, a new episode begins first. If this raises, the state has not changed.
        Raises an `ActserveError`.
        """
        values = flatten(observation)
        begins = values.pop(IS_INIT.name, False)
        tensors = await off_loop.call(self._tensors, values, takes_long=encoded_bytes(values.values()) > MANY_BYTES)
        if _is_true(begins) and self.state.steps:
            await self.reset()
        return await self.state.act(tensors, patience_ns)

    def locate(self, observation: Any) -> dict[str, Any] | None:
        """The value of each input in an observation, if the fast path can take a step on it.

        None: `step` does, as for encoded images and a new episode. Raises an `ActserveError`, as `step` then does.
        """
        values = flatten(observation)
        if values.pop(IS_INIT.name, False) is not False or encoded_bytes(values.values()):
            return None
        found = {known: values[name] for name, known in self._map(values).items()}
        return found if found.keys() == self._observations.keys() else None

    def convert(self, found: Mapping[str, Any]) -> Arrays:
        """The tensors of located values, each (1, *shape). They are validated with the batch.

        Raises an `ActserveError`, also for an image that `step` would resize.
        """
        return {name: to_tensor(found[name], spec) for name, spec in self._observations.items()}

    async def reset(self) -> None:
        """Begin a new episode, on the version that is live now. Raises an `ActserveError`; then nothing has changed."""
        policy = await self._service.registry.begin(self.policy.name)
        last, self.state = self.state, self._begin(policy)
        last.close()

    def refused(self, error: ActserveError) -> int:
        """Count an error that the robot is told, and log it if it is internal; returns its HTTP status."""
        return self.state.refused(error)

    def close(self) -> None:
        """Free the state."""
        self.state.close()

    def _begin(self, policy: Policy) -> EpisodeState:
        admission = self._service.admission
        state = EpisodeState(policy, admission, self._tally, self._token, self._query, "robot")
        signature = replace(policy.signature, max_batch=1, state=(), noise=(), is_init=False)
        self._signature = signature
        self._specs = {spec.name: spec for spec in signature.request_inputs}
        self._observations: dict[str, TensorSpec] = {spec.name: spec for spec in signature.observations}
        self._map = NameMap(list(self._specs), self._service.settings.ignored)
        self._resizes = resizes_of(policy)
        self.max_message_bytes = admission.max_body_bytes
        if not self._resizes:  # otherwise its images may be larger than the inputs
            largest_bytes = OVERHEAD_BYTES + ELEMENT_BYTES * sum(spec.elements for spec in self._specs.values())
            self.max_message_bytes = min(self.max_message_bytes, largest_bytes)
        return state

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
