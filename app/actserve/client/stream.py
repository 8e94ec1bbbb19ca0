"""Stream: an episode over a WebSocket. The service keeps its state."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pydantic_core
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect, unix_connect

from actserve.client.operations import as_array, named_observations, service_error, unwrap_action
from actserve.client.transport import (
    ANSWER_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    authorization_header,
    parse_service_url,
    stream_url,
)
from actserve.core.environment import Contract
from actserve.core.errors import MalformedBody, ServiceError, ServiceUnreachable, UsageError
from actserve.core.signature import Array, Arrays, Exploration, Signature, TensorSpec
from actserve.wire.payload import find_spec
from actserve.wire.stream_messages import Hello, Reply, ReplyCodec, Result, result_message

CLOSE_TIMEOUT_S = 2.0


class Stream:
    """One episode of `policy`. Defaults: the service's default policy, and its live version.

    A context manager over one connection. Do not share it between threads. The replies have `outputs` beside the
    action. `seed` makes all the episode's randomness reproducible. If the policy plans chunks of actions,
    `chunk="step"` gets one action for each observation: the policy runs once a chunk, `ahead` steps before its actions
    are needed.

    Every method raises `ServiceError` if the service answers with an error: the episode does not advance, and the
    stream stays open. It raises `ServiceUnreachable` if there is no answer: the episode is over. If the service closed
    the stream, `detail["close_code"]` has the close code.
    """

    def __init__(
        self,
        url: str,
        policy: str | None = None,
        version: int | None = None,
        uds: str | None = None,
        token: str | None = None,
        *,
        outputs: Sequence[str] = (),
        exploration: Exploration | None = None,
        seed: int | None = None,
        chunk: Literal["whole", "step"] | None = None,
        ahead: int | None = None,
    ) -> None:
        self.unanswered = 0  # messages sent whose replies are still to be received
        self.steps = 0  # the step number in the last reply
        self.outputs: Arrays = {}  # of the last reply, each (*shape)
        query = {"outputs": ",".join(outputs) or None, "exploration": exploration, "seed": seed}
        query |= {"chunk": chunk, "ahead": ahead}
        self._url, self._uds = stream_url(parse_service_url(url), policy, version, query), uds
        self._headers = authorization_header(token)
        self._stack = ExitStack()
        self._connection: ClientConnection | None = None
        self._hello: Hello | None = None
        self._replies = ReplyCodec(())

    def __enter__(self) -> Self:
        with ExitStack() as stack, self._translated():
            self._connection = stack.enter_context(self._connect())
            self._hello = Hello.from_json(self._connection.recv(ANSWER_TIMEOUT_S, decode=True))
            self._stack = stack.pop_all()
        self._replies = ReplyCodec(self.signature.outputs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """The action for one observation (*shape): an int if it is a single discrete one, else an array.

        A policy with several observations takes them by name. `{"pixels": ..., "is_init": np.array(True)}` begins
        another episode. Raises `InvalidTensor` before it sends anything.
        """
        if self.unanswered:
            raise UsageError(f"receive the replies to the {self.unanswered} messages sent ahead before calling act")
        self.send(observation)
        return unwrap_action(self.receive().outputs[self.signature.action.name])

    def send(self, observation: Array | Mapping[str, Array]) -> None:
        """Send without waiting for the reply. At most `hello.window` messages may be unanswered. Raises like `act`."""
        if self.unanswered >= self.hello.window:
            raise UsageError(f"{self.unanswered} messages are unanswered, the limit; receive a reply first")
        message = self._message(observation)
        with self._translated():
            self._socket.send(message)
        self.unanswered += 1

    def tell(self, reward: float | None = None, done: bool | None = None) -> None:
        """Tell the service the result of the last step, for its recording. If it does not record, nothing is sent.

        Raises `UsageError` if messages are unanswered, or if the reward is not finite.
        """
        if self.unanswered:
            raise UsageError(f"receive the replies to the {self.unanswered} messages sent ahead before calling tell")
        if reward is not None and not np.isfinite(reward):
            raise UsageError(f"expected a finite reward; got {reward}")
        if self.hello.recorded:
            result = Result(reward=None if reward is None else float(reward), done=None if done is None else bool(done))
            with self._translated():
                self._socket.send(result_message(result))

    def receive(self) -> Reply:
        """The reply to the oldest unanswered message. Also sets `outputs` and `steps`."""
        if not self.unanswered:
            raise UsageError("there is nothing to receive: every message has its reply")
        with self._translated():
            message = self._socket.recv(ANSWER_TIMEOUT_S)
            self.unanswered -= 1
            reply = self._replies.unpack(message) if isinstance(message, bytes) else self._read(message)
        self.steps, self.outputs = reply.step, reply.outputs
        return reply

    @property
    def hello(self) -> Hello:
        """The service's first message: policy, version, signature, window."""
        assert self._hello is not None, "use Stream in a with block"
        return self._hello

    @property
    def signature(self) -> Signature:
        """The signature of one message and its reply. It has no state: the service keeps it."""
        return self.hello.signature

    @property
    def environment(self) -> Contract | None:
        return self.hello.environment

    @property
    def _socket(self) -> ClientConnection:
        assert self._connection is not None, "use Stream in a with block"
        return self._connection

    def _connect(self) -> AbstractContextManager[ClientConnection]:
        options: dict[str, Any] = {
            "compression": None,
            "max_size": None,
            "open_timeout": CONNECT_TIMEOUT_S,
            "close_timeout": CLOSE_TIMEOUT_S,
            "additional_headers": self._headers,
        }
        if self._uds is not None:
            unix: AbstractContextManager[ClientConnection] = unix_connect(self._uds, self._url, **options)
            return unix
        tcp: AbstractContextManager[ClientConnection] = connect(self._url, proxy=None, **options)
        return tcp

    def _message(self, observation: Array | Mapping[str, Array]) -> memoryview | str:
        """The message: raw bytes for a single tensor, JSON for several."""
        named = named_observations(self.hello.policy, self.signature, observation)
        items = {name: np.ascontiguousarray(as_array(array)[None]) for name, array in named.items()}
        self.signature.validate_request(items)
        specs = {name: find_spec(name, self.signature.request_inputs) for name in items}
        if len(items) == 1:
            ((name, array),) = items.items()
            return specs[name].to_wire(array).data.cast("B")
        return pydantic_core.to_json({name: _b64(specs[name], array[0]) for name, array in items.items()}).decode()

    def _read(self, text: str) -> Reply:
        """Read a JSON message: a reply, or an error, which is raised."""
        try:
            document = pydantic_core.from_json(text)
        except ValueError:
            document = None
        if isinstance(document, dict) and "error" in document:
            raise service_error(document.get("status", 500), text.encode())
        return self._replies.from_json(text)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Translate the errors of sockets and of the websockets library into ours."""
        try:
            yield
        except InvalidStatus as error:
            raise service_error(error.response.status_code, bytes(error.response.body or b"")) from error
        except ConnectionClosed as error:
            self.unanswered = 0
            code, reason = (error.rcvd.code, error.rcvd.reason) if error.rcvd else (None, "the connection broke")
            over = f"the stream from {self._url} is over: {f'{code} ' if code else ''}{reason}"
            raise ServiceUnreachable(over, close_code=code) from error
        except (OSError, WebSocketException) as error:  # TimeoutError is an OSError
            self._stack.close()  # a late reply must not be taken for the next message's
            self.unanswered = 0
            raise ServiceUnreachable(f"no answer from {self._url}: {error}", close_code=None) from error
        except MalformedBody as error:
            raise ServiceError(200, "unintelligible", error.message) from error


def _b64(spec: TensorSpec, array: Array) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": array.shape, "b64": base64.b64encode(spec.to_wire(array).tobytes())}
