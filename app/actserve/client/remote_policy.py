"""RemotePolicy: a policy served elsewhere, called like a local one. Needs neither torch nor FastAPI."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from actserve.client import operations
from actserve.client.operations import Description, Operation, Result, plain
from actserve.client.tensordicts import read_tensordict, write_tensordict
from actserve.client.transport import HttpConnection
from actserve.core.completion import step_seed
from actserve.core.environment import Environment
from actserve.core.errors import ProxyFailed, ServiceUnreachable
from actserve.core.signature import Array, Arrays, Exploration, Signature

ATTEMPTS = 3  # at a step of an episode; a session's is taken once
LOST = (ServiceUnreachable, ProxyFailed)  # no answer of the service's own


class RemotePolicy:
    """The policy `policy` (by default the service's default one) of the service at `url`, or at a Unix socket `uds`.

    `token` is sent with every request. The certificate of an https service is checked against those that this host
    trusts, or against the file that SSL_CERT_FILE names.
    A context manager over one kept connection, not to be shared between threads. Everything raises
    `ServiceUnreachable` when there is no answer and `ServiceError` when the answer is an error.
    """

    def __init__(self, url: str, policy: str | None = None, uds: str | None = None, token: str | None = None) -> None:
        self.url = url
        self.uds = uds
        self.token = token
        self._wanted = policy
        self._connection: HttpConnection | None = None
        self._description: Description | None = None

    def __enter__(self) -> Self:
        self._connection = HttpConnection(self.url, self.uds, self.token)
        try:
            self._description = self.run(operations.describe(self._wanted))
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.close()

    def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """The policy's action for one observation (*shape), or the k actions for a batch (k, *shape).

        A single discrete action is an int; anything else an array (*action shape) or (k, *action shape). A policy
        with several observations takes them by name. Raises `InvalidTensor` before anything is sent.
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

        Each is one item (*shape), or each a batch (k, *shape). New state goes by the name of the input that it
        replaces. Raises `InvalidTensor` before anything is sent.
        """
        return self.run(operations.step(self.description, tensors, outputs, exploration, seed))

    def __call__(self, tensordict: Any) -> Any:
        """Act on a TensorDict as a TorchRL module does: write the outputs, and new state under ``("next", key)``.

        Batch size [] or [k]. Returns `tensordict`.
        """
        tensors = read_tensordict(tensordict, self.signature)
        results = self.step(tensors, [spec.name for spec in self.signature.outputs])
        return write_tensordict(tensordict, results, self.signature)

    def episode(
        self, outputs: Sequence[str] = (), *, exploration: Exploration | None = None, seed: int | None = None
    ) -> Episode:
        """One episode, of which the state is carried here. With `seed` everything random in it comes from that."""
        return Episode(self, outputs, exploration, seed)

    def session(
        self,
        outputs: Sequence[str] = (),
        *,
        exploration: Exploration | None = None,
        seed: int | None = None,
        owner: str | None = None,
    ) -> RemoteSession:
        """One episode, of which the service keeps the state."""
        id_ = self.run(operations.begin_session(self.description, exploration, seed, owner))
        return RemoteSession(self, id_, outputs)

    def run(self, operation: Operation[Result]) -> Result:
        """One operation, over this policy's connection."""
        assert self._connection is not None, "to be used in a with block"
        try:
            request = next(operation)
            while True:
                request = operation.send(self._connection.exchange(request))
        except StopIteration as done:
            result: Result = done.value
            return result

    def insist(self, ask: Callable[[], Operation[Result]]) -> Result:
        """The same operation, up to `ATTEMPTS` times, until there is an answer of the service itself."""
        for _ in range(ATTEMPTS - 1):
            with suppress(*LOST):
                return self.run(ask())
        return self.run(ask())

    @property
    def description(self) -> Description:
        """As the service gave it when this was entered."""
        assert self._description is not None, "to be used in a with block"
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
        return self.description.environment


class Carried:
    """What an episode carries from one step to the next; the same for both clients."""

    def __init__(
        self, description: Description, outputs: Sequence[str], exploration: Exploration | None, seed: int | None
    ) -> None:
        self.description = description
        self.outputs: Arrays = {}  # of the last step, without the state
        self.state: Arrays = {}  # what the next step is given; empty: it is the first
        self.steps = 0
        self._wanted, self._exploration, self._seed = outputs, exploration, seed

    def act(self, observation: Array | Mapping[str, Array]) -> Operation[Any]:
        """The operation of the next step; its result is the action."""
        description, signature = self.description, self.description.signature
        drawn = signature.noise and self._seed is not None
        if not (signature.state or self._wanted or self._exploration or drawn):
            action = yield from operations.act(description, observation)
            self.steps += 1
            return action
        seed = None if self._seed is None else step_seed(self._seed, self.steps + 1)
        tensors = {**description.by_name(observation), **self.state}
        outputs = yield from operations.step(description, tensors, self._wanted, self._exploration, seed)
        self.steps += 1
        self.state = {state.spec.name: outputs.pop(state.spec.name) for state in signature.state}
        self.outputs = outputs
        return plain(outputs[signature.action.name])


class Episode:
    """One episode played with a `RemotePolicy`: `act` in order, with the state of the step before."""

    def __init__(
        self, policy: RemotePolicy, outputs: Sequence[str], exploration: Exploration | None, seed: int | None
    ) -> None:
        self._policy = policy
        self._carried = Carried(policy.description, outputs, exploration, seed)

    def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """The action for one observation (*shape): an int if it is a single discrete one, else an array.

        A step that fails moves nothing: one whose answer was lost is asked for again.
        """
        return self._policy.insist(lambda: self._carried.act(observation))

    @property
    def outputs(self) -> Arrays:
        """Of the last step, by name; empty if only the action was wanted."""
        return self._carried.outputs


class RemoteSession:
    """One episode whose state the service keeps. A context manager: at its end the session is ended."""

    def __init__(self, policy: RemotePolicy, id_: str, outputs: Sequence[str]) -> None:
        self.id = id_
        self.steps = 0
        self.outputs: Arrays = {}  # of the last step
        self._policy = policy
        self._wanted = outputs

    def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """As `Episode.act`. A step whose answer was lost is asked for again, and taken once."""
        description = self._policy.description
        within = operations.Step(self.id, self.steps + 1)
        tensors = description.by_name(observation)
        self.outputs = self._policy.insist(lambda: operations.step(description, tensors, self._wanted, within=within))
        self.steps += 1
        return plain(self.outputs[description.signature.action.name])

    def end(self) -> None:
        """Tell the service that the session is over. Raises as `act` does."""
        self._policy.run(operations.end_session(self._policy.description, self.id))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
