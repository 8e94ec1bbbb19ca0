"""RemotePolicy: call a policy of a service like a local one. Needs neither torch nor FastAPI."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

from actserve.client import operations
from actserve.client.operations import Operation, PolicyDescription, Result, unwrap_action
from actserve.client.transport import HttpConnection
from actserve.core.completion import step_seed
from actserve.core.environment import Environment, game_of
from actserve.core.errors import ActserveError, ProxyFailed, ServiceUnreachable
from actserve.core.robot import Robot
from actserve.core.signature import Array, Arrays, Exploration, Signature

MAX_ATTEMPTS = 3  # per step of an episode; a session takes a retried step once
RETRIED_ERRORS = (ServiceUnreachable, ProxyFailed)  # the service itself did not answer


class RemotePolicy:
    """One policy of the service at `url`, or at the Unix socket `uds`. `policy` None: the service's default policy.

    Every request carries `token`. The client checks an https certificate against the host's trusted certificates, or
    against the file in SSL_CERT_FILE.
    `robot` is the client's. If it names other joints, observation terms, units, scales or another order than the policy
    was trained with, the first request raises `EnvironmentMismatch`.
    It keeps one connection open, from the first request to the end of a `with` block. Do not share it between threads;
    a pickled copy opens its own. Every method raises `ServiceUnreachable` if there is no answer and `ServiceError` if
    the answer is an error.
    """

    def __init__(
        self,
        url: str,
        policy: str | None = None,
        uds: str | None = None,
        token: str | None = None,
        robot: Robot | None = None,
    ) -> None:
        self.url = url
        self._robot = robot
        self.uds = uds
        self.token = token
        self._policy_name = policy
        self._connection: HttpConnection | None = None
        self._description: PolicyDescription | None = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process, such as a worker of TorchRL's collectors, opens a connection of its own."""
        return self.__dict__ | {"_connection": None, "_description": None}

    def _open(self) -> HttpConnection:
        self._connection = HttpConnection(self.url, self.uds, self.token)
        try:
            self._description = self.run(operations.describe(self._policy_name))
            self._description.check_robot(self._robot)
        except BaseException:
            self._connection.close()
            self._connection = None
            raise
        return self._connection

    def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """The policy's action for one observation (*shape), or the k actions for a batch (k, *shape).

        A single discrete action is an int; any other action is an array (*action shape) or (k, *action shape). A
        policy with several observations takes them by name. Raises `InvalidTensor` before it sends anything.
        """
        return self.run(operations.act(self.description, observation))

    def step(
        self,
        tensors: Mapping[str, Array],
        outputs: Sequence[str] = (),
        *,
        exploration: Exploration | None = None,
        seed: int | None = None,
    ) -> Arrays:
        """Any inputs of the signature by name -> the action, `outputs`, and the new state, all by name.

        Every input is one item (*shape), or every input is a batch (k, *shape). New state has the name of the input
        that it replaces. Raises `InvalidTensor` before it sends anything.
        """
        return self.run(operations.step(self.description, tensors, outputs, exploration, seed)).outputs

    def __call__(self, tensordict: Any) -> Any:
        """Act on a TensorDict of any batch size as a TorchRL module does. Returns `tensordict`.

        Writes the outputs, new state under ``("next", key)``, and the version that acted as "policy_version". The
        policy explores as TorchRL's `set_exploration_type` says, if it can; by default it acts as it was exported.
        """
        return self.run(operations.act_on_tensordict(self.description, tensordict))

    def episode(
        self, outputs: Sequence[str] = (), *, exploration: Exploration | None = None, seed: int | None = None
    ) -> Episode:
        """One episode whose state the client keeps. `seed` makes all its randomness reproducible."""
        return Episode(self, outputs, exploration, seed)

    def session(
        self,
        outputs: Sequence[str] = (),
        *,
        exploration: Exploration | None = None,
        seed: int | None = None,
        owner: str | None = None,
        chunk: Literal["step"] | None = None,
    ) -> RemoteSession:
        """One episode whose state the service keeps. If an answer is lost, it asks again for the same session.

        `chunk="step"` gets one action of the policy's chunk with each step.
        """
        key = secrets.token_urlsafe(16)
        id_ = self.run_with_retries(
            lambda: operations.begin_session(self.description, exploration, seed, owner, key, chunk)
        )
        return RemoteSession(self, id_, outputs, by_action=chunk == "step")

    def run(self, operation: Operation[Result]) -> Result:
        """Run one operation over this policy's connection and return its result."""
        connection = self._connection or self._open()
        try:
            request = next(operation)
            while True:
                request = operation.send(connection.exchange(request))
        except StopIteration as done:
            result: Result = done.value
            return result

    def run_with_retries(self, operation: Callable[[], Operation[Result]]) -> Result:
        """Run the same operation up to `MAX_ATTEMPTS` times, until the service itself answers."""
        for _ in range(MAX_ATTEMPTS - 1):
            with suppress(*RETRIED_ERRORS):
                return self.run(operation())
        return self.run(operation())

    @property
    def description(self) -> PolicyDescription:
        """The service's description of the policy, fetched once."""
        if self._description is None:
            self._open()
        assert self._description is not None
        return self._description

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def version(self) -> int:
        return self.description.version

    @property
    def runtime(self) -> str:
        return self.description.runtime

    @property
    def signature(self) -> Signature:
        return self.description.signature

    @property
    def environment(self) -> Environment | None:
        """The game that the policy plays, or None."""
        return game_of(self.description.environment)

    @property
    def robot(self) -> Robot | None:
        """The robot that the policy was trained on, or None."""
        found = self.description.environment
        return found if isinstance(found, Robot) else None


class CarriedState:
    """The state that an episode carries from one step to the next. Both clients use it."""

    def __init__(
        self, description: PolicyDescription, outputs: Sequence[str], exploration: Exploration | None, seed: int | None
    ) -> None:
        self.description = description
        self.outputs: Arrays = {}  # of the last step, without the state
        self.state: Arrays = {}  # the next step's input; empty before the first step
        self.steps = 0
        self._output_names, self._exploration, self._seed = outputs, exploration, seed

    def act(self, observation: Array | Mapping[str, Array]) -> Operation[Any]:
        """The operation of the next step; its result is the action."""
        description, signature = self.description, self.description.signature
        uses_seed = signature.noise and self._seed is not None
        if not (signature.state or self._output_names or self._exploration or uses_seed):
            action = yield from operations.act(description, observation)
            self.steps += 1
            return action
        seed = None if self._seed is None else step_seed(self._seed, self.steps + 1)
        tensors = {**description.named_observations(observation), **self.state}
        stepped = yield from operations.step(description, tensors, self._output_names, self._exploration, seed)
        outputs = stepped.outputs
        self.steps += 1
        self.state = {state.spec.name: outputs.pop(state.spec.name) for state in signature.state}
        self.outputs = outputs
        return unwrap_action(outputs[signature.action.name])


class Episode:
    """One episode played with a `RemotePolicy`. Call `act` in order: each step uses the state of the step before."""

    def __init__(
        self, policy: RemotePolicy, outputs: Sequence[str], exploration: Exploration | None, seed: int | None
    ) -> None:
        self._policy = policy
        self._carried = CarriedState(policy.description, outputs, exploration, seed)

    def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """The action for one observation (*shape): an int if it is a single discrete one, else an array.

        Retries a step whose answer was lost. A failed step does not advance the episode.
        """
        return self._policy.run_with_retries(lambda: self._carried.act(observation))

    @property
    def outputs(self) -> Arrays:
        """The last step's outputs by name. Empty if the episode asked for the action only."""
        return self._carried.outputs


class KeptEpisode(ABC):
    """An episode whose state the service keeps. A context manager that ends it."""

    @abstractmethod
    def end(self) -> None:
        """End the episode at the service."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.end()
        except ActserveError:
            if kind is None:  # otherwise it would hide the exception of the block
                raise


class RemoteSession(KeptEpisode):
    """One episode whose state the service keeps. A context manager that ends the session."""

    def __init__(self, policy: RemotePolicy, id_: str, outputs: Sequence[str], by_action: bool = False) -> None:
        self.id = id_
        self._by_action = by_action
        self.steps = 0
        self.outputs: Arrays = {}  # of the last step
        self._policy = policy
        self._output_names = outputs
        self._result: dict[str, str] = {}  # of the last step, not yet sent

    def tell(self, reward: float | None = None, done: bool | None = None) -> None:
        """Tell the service the result of the last step, for its recording. It is sent with the next request."""
        self._result = operations.result_headers(reward, done)

    def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """See `Episode.act`. Retries a step whose answer was lost; the service takes it once."""
        description = self._policy.description
        step = operations.SessionStep(self.id, self.steps + 1, self._by_action, self._result)
        tensors = description.named_observations(observation)
        self.outputs = self._policy.run_with_retries(
            lambda: operations.step(description, tensors, self._output_names, session_step=step)
        ).outputs
        self.steps += 1
        self._result = {}
        action = description.signature.planned if self._by_action else description.signature.action
        return unwrap_action(self.outputs[action.name])

    def end(self) -> None:
        """End the session at the service. Raises the same errors as `act`."""
        self._policy.run_with_retries(lambda: operations.end_session(self._policy.description, self.id, self._result))
