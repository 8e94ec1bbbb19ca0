"""Backend: one protocol of the load generator. It encodes all requests before the clock starts."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pydantic_core

from actserve import wire
from actserve.client.operations import HttpRequest, PolicyDescription, request_body
from actserve.client.transport import authorization_header, parse_service_url, path_prefix
from actserve.core.signature import IS_INIT, Arrays
from actserve.loadtest.connection import ConnectionListener, HttpLoadConnection, LoadConnection, RequestParts

OBSERVATIONS = 32  # different observations, sent in a cycle

SendRequest = Callable[[RequestParts], Awaitable[tuple[int, bytes]]]  # HTTP request -> status (0: no answer) and body


class Backend(ABC):
    """One protocol, spoken with the service at `url`. `seed` determines all observations, equally in every process.

    An answer may depend on earlier requests of the same connection: if the policy has state, or if its noise depends on
    the step's number. Then all connections send the same requests in the same order, and begin a new episode with the
    first observation of each cycle. So requests with the same key get the same answer on every connection.
    """

    def __init__(self, url: str, description: PolicyDescription, seed: int, token: str | None = None) -> None:
        self.authorization = authorization_header(token)
        self.description = description
        self.signature = description.signature
        self.url = parse_service_url(url)
        self.noise_seed = seed if self.signature.draws(self.signature.exploration[0]) else None
        self.shared_keys: Iterator[int] = itertools.cycle(range(OBSERVATIONS))  # of requests for any connection
        self._seed = seed

    def connection(self, listener: ConnectionListener) -> LoadConnection:
        """A new connection. The caller opens it, then calls `prepare`."""
        return HttpLoadConnection(listener)

    @abstractmethod
    async def prepare(self, connection: LoadConnection) -> None:
        """Do the protocol's handshake and set the connection's script. Raises `ServiceError`; OSError if no answer
        comes."""

    async def clean_up(self, send: SendRequest) -> None:  # noqa: B027 - optional
        """End the sessions or sequences that outlive their connections."""

    def decode(self, answer: bytes) -> Mapping[str, Any]:
        """The outputs by name, array-likes, to compare answers. Raises ValueError or `InvalidRequest`."""
        outputs: dict[str, Any] = pydantic_core.from_json(answer)
        return outputs

    # helpers of the backends

    @cached_property
    def observations(self) -> list[Arrays]:
        """Random observations, each tensor (1, *shape)."""
        rng = np.random.default_rng(self._seed)
        batches = {spec.name: spec.sample(rng, OBSERVATIONS) for spec in self.signature.observations}
        return [{name: batch[index : index + 1] for name, batch in batches.items()} for index in range(OBSERVATIONS)]

    @cached_property
    def steps(self) -> list[Arrays]:
        """The observations as steps of an episode. If the policy takes `is_init`, it is true in the first step."""
        if not (self.signature.state and self.signature.is_init):
            return self.observations
        flags = [{IS_INIT.name: np.array([index == 0])} for index in range(OBSERVATIONS)]
        return [{**observation, **flag} for observation, flag in zip(self.observations, flags, strict=True)]

    @cached_property
    def bodies(self) -> tuple[str, list[bytes]]:
        """The content type of `steps`, and each step encoded."""
        if IS_INIT.name in self.steps[0]:
            items = [wire.Payload(step, batched=False) for step in self.steps]
            return wire.SAFETENSORS, [
                wire.encode_request(wire.SAFETENSORS, item, self.signature.request_inputs) for item in items
            ]
        pairs = [request_body(self.signature, step, batched=False) for step in self.steps]
        return pairs[0][0], [bytes(body) for _, body in pairs]

    def episode_keys(self) -> Iterator[int]:
        """The request keys of one connection, without end."""
        if not self.signature.state and self.noise_seed is None:
            return self.shared_keys
        if self.signature.is_init and self.noise_seed is None:
            return itertools.cycle(range(OBSERVATIONS))
        return itertools.count()  # one endless episode: every step has its own answer

    def encode_head(self, request: HttpRequest) -> bytes:
        """The request line and the headers. More headers, an empty line and the body may follow."""
        headers = {
            "Host": self.url.netloc,
            "Content-Length": len(request.body or b""),
            **request.headers,
            **self.authorization,
        }
        path = path_prefix(self.url) + request.path
        lines = [f"{request.method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), ""]
        return "\r\n".join(lines).encode()

    def encode(self, request: HttpRequest) -> RequestParts:
        return (self.encode_head(request) + b"\r\n", bytes(request.body or b""))


class IndependentRequests:
    """A script of requests that do not depend on each other. A key is an index into `requests`."""

    def __init__(self, keys: Iterator[int], requests: Sequence[RequestParts]) -> None:
        self._keys, self._requests = keys, requests

    def next(self) -> tuple[int, RequestParts]:
        key = next(self._keys)
        return key, self._requests[key]

    def on_answer(self, status: int) -> bool:
        return True


class EpisodeSteps:
    """A script of the steps of an episode. A failed step does not advance the episode; it is sent again.

    `request` encodes a step from the index of its observation and its number, from 1. `over`: the service refused a
    step (4xx), so the episode cannot go on.
    """

    def __init__(self, keys: Iterator[int], request: Callable[[int, int], RequestParts]) -> None:
        self.over = False
        self._keys, self._request = keys, request
        self._key = next(keys)
        self._step = 1

    def next(self) -> tuple[int, RequestParts]:
        return self._key, self._request(self._key % OBSERVATIONS, self._step)

    def on_answer(self, status: int) -> bool:
        if status == 200:
            self._key = next(self._keys)
            self._step += 1
        self.over = 400 <= status < 500
        return not self.over
