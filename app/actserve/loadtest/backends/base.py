"""Backend: everything that one way of speaking to a service can make ready before the clock starts."""

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
from actserve.loadtest.connection import HttpConnection, LoadConnection, Owner, Parts

OBSERVATIONS = 32  # different ones are sent in turn

Ask = Callable[[Parts], Awaitable[tuple[int, bytes]]]  # an HTTP request -> status and body; 0: there was no answer


class Backend(ABC):
    """One way of speaking to the service at `url`, which may ask for a `token`. Everything random comes from `seed`,
    the same in every process.

    Where an answer depends on what was asked before it on the same connection (the policy has state, or its noise
    comes with the step's number), each connection asks the same in the same order, and begins a new episode with the
    first observation of each round: then the same question has the same answer on every connection.
    """

    def __init__(self, url: str, description: PolicyDescription, seed: int, token: str | None = None) -> None:
        self.authorization = authorization_header(token)
        self.description = description
        self.signature = description.signature
        self.url = parse_service_url(url)
        self.drawn = seed if self.signature.noise and self.signature.exploration[0] == "random" else None
        self.turns: Iterator[int] = itertools.cycle(range(OBSERVATIONS))  # of what may be asked by any connection
        self._seed = seed

    def connection(self, owner: Owner) -> LoadConnection:
        """A new one, to be opened and then to be begun."""
        return HttpConnection(owner)

    @abstractmethod
    async def begin(self, connection: LoadConnection) -> None:
        """Say what comes before the first question, and set the script. Raises `ServiceError`, or OSError if nothing
        is answered."""

    async def end(self, ask: Ask) -> None:  # noqa: B027 - most need not
        """End at the service what was begun there and does not end with its connection."""

    def read(self, answer: bytes) -> Mapping[str, Any]:
        """The outputs by name, array-likes, which answers are compared by. Raises ValueError or `InvalidRequest`."""
        outputs: dict[str, Any] = pydantic_core.from_json(answer)
        return outputs

    # what they have in common

    @cached_property
    def observations(self) -> list[Arrays]:
        """Random ones, each (1, *shape)."""
        rng = np.random.default_rng(self._seed)
        batches = {spec.name: spec.sample(rng, OBSERVATIONS) for spec in self.signature.observations}
        return [{name: batch[index : index + 1] for name, batch in batches.items()} for index in range(OBSERVATIONS)]

    @cached_property
    def steps(self) -> list[Arrays]:
        """The same as the steps of an episode: with the reset flag, true in the first, if the policy takes it."""
        if not (self.signature.state and self.signature.is_init):
            return self.observations
        flags = [{IS_INIT.name: np.array([index == 0])} for index in range(OBSERVATIONS)]
        return [{**observation, **flag} for observation, flag in zip(self.observations, flags, strict=True)]

    @cached_property
    def bodies(self) -> tuple[str, list[bytes]]:
        """The content type of `steps`, and each of them encoded."""
        if IS_INIT.name in self.steps[0]:
            items = [wire.Payload(step, batched=False) for step in self.steps]
            return wire.SAFETENSORS, [wire.encode_request(wire.SAFETENSORS, item) for item in items]
        pairs = [request_body(self.signature, step, batched=False) for step in self.steps]
        return pairs[0][0], [bytes(body) for _, body in pairs]

    def turns_of_an_episode(self) -> Iterator[int]:
        """Questions for one connection, without end."""
        if not self.signature.state and self.drawn is None:
            return self.turns
        if self.signature.is_init and self.drawn is None:
            return itertools.cycle(range(OBSERVATIONS))
        return itertools.count()  # nothing begins anew: every step has an answer of its own

    def head(self, request: HttpRequest) -> bytes:
        """An HTTP request up to where further headers, an empty line and its body may follow."""
        headers = {
            "Host": self.url.netloc,
            "Content-Length": len(request.body or b""),
            **request.headers,
            **self.authorization,
        }
        path = path_prefix(self.url) + request.path
        lines = [f"{request.method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), ""]
        return "\r\n".join(lines).encode()

    def whole(self, request: HttpRequest) -> Parts:
        """An HTTP request."""
        return (self.head(request) + b"\r\n", bytes(request.body or b""))


class Requests:
    """A script of requests that each stand alone."""

    def __init__(self, turns: Iterator[int], requests: Sequence[Parts]) -> None:
        self._turns, self._requests = turns, requests

    def next(self) -> tuple[int, Parts]:
        question = next(self._turns)
        return question, self._requests[question]

    def answered(self, status: int) -> bool:
        return True


class Steps:
    """A script of steps of an episode: one that fails has moved nothing and is asked again.

    `request` makes a step's request from the index of its observation and from its number, from 1. `over`: the service
    refused a step, and with it all that would have come after.
    """

    def __init__(self, turns: Iterator[int], request: Callable[[int, int], Parts]) -> None:
        self.over = False
        self._turns, self._request = turns, request
        self._question = next(turns)
        self._step = 1

    def next(self) -> tuple[int, Parts]:
        return self._question, self._request(self._question % OBSERVATIONS, self._step)

    def answered(self, status: int) -> bool:
        if status == 200:
            self._question = next(self._turns)
            self._step += 1
        self.over = 400 <= status < 500
        return not self.over
