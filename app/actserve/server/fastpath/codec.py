"""Codec: reads the requests of one kind, and writes their answers.

A kind is a URL and the headers that say how requests and answers are encoded: clients repeat them with each request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastapi import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from actserve.core.errors import ActserveError
from actserve.core.signature import IS_INIT, Array, Arrays, Signature
from actserve.engine.batch import BatchResult
from actserve.server.access.tokens import Token
from actserve.server.fastpath.endpoint import Endpoint
from actserve.telemetry.counts import Tally
from actserve.wire.payload import MANY_VALUES, Body

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class DecodedRequest:
    """The content of a body. `tensors` are the observations, each (size, *shape)."""

    tensors: Arrays
    size: int
    batched: bool  # the answer has a batch axis
    state: Arrays | None = None  # each (1, *shape), if the client carries it
    is_init: bool | None = None  # the reset flag, if the request has it
    lent: Sequence[Array] = ()  # memory of the arena, to be taken back
    sequence: int | str | None = None  # that takes a step


class Codec(ABC):
    """`names` are those of the outputs and states in an answer. The routes take batches of more than `max_items`.

    `in_place`: a body is the bytes of observations, and is received into the memory of the next batch.
    """

    in_place = False

    def __init__(self, endpoint: Endpoint, tally: Tally, names: Sequence[str], single: bool) -> None:
        self.endpoint, self._tally = endpoint, tally
        self._signature = signature = endpoint.policy.signature
        states = {state.spec.name: state.output for state in signature.state}
        self._results = {name: states.get(name, name) for name in names}  # their names among those of the program
        elements = sum(spec.elements for spec in signature.answers if spec.name in self._results)
        self.max_items = min(endpoint.max_items, MANY_VALUES // max(1, elements))
        if signature.state or single:
            self.max_items = min(1, self.max_items)  # the arena has one state for each request
        self._headers: Headers = []
        self._prefix = b""

    @abstractmethod
    def read(self, body: Body, token: Token | None) -> DecodedRequest | None:
        """None: the route handles the request, and raises its errors. `token` is the client's, if any."""

    def answer(
        self,
        outcome: BatchResult,
        start: int,
        size: int,
        decoded: DecodedRequest | None,
        headers: Headers,
        fields: bytes = b"",
    ) -> bytes:
        """The response for `size` items of a batch from `start` on, with the header lines `fields`.

        `decoded` is the request; None: it was received in place. `headers` are the server's own: a new list every
        second, with the date.
        """
        try:
            rest = self._write(outcome, start, size, decoded)
        except ActserveError as error:
            return self.refusal(error, headers, decoded)
        self._tally.answered += 1
        if headers is not self._headers:
            self._headers, self._prefix = headers, response_prefix(200, headers)
        return b"%s%s%s" % (self._prefix, fields, rest)

    @abstractmethod
    def refusal(self, error: ActserveError, headers: Headers, decoded: DecodedRequest | None = None) -> bytes:
        """The response to a request that raised `error`, which it counts."""

    @abstractmethod
    def _write(self, outcome: BatchResult, start: int, size: int, decoded: DecodedRequest | None) -> bytes:
        """The response without the status line and the server's headers. Raises an `ActserveError`."""

    def _takes(self, tensors: Arrays, size: int) -> bool:
        """Whether the fast path takes a request of this size with these inputs."""
        parameters = self._signature.parameters
        return size <= self.max_items and not any(parameter.name in tensors for parameter in parameters)


class Resource(Protocol):
    """The requests to one URL."""

    def codec(self, fields: dict[bytes, bytes], query: bytes) -> Codec | None:
        """The codec of requests with these headers and this query; None: the routes handle them.

        Removes the headers that it understands.
        """


Resources = Mapping[bytes, Resource]  # by path


def split_state(tensors: Arrays, signature: Signature) -> tuple[Arrays | None, bool | None]:
    """Take the state, if any, and the reset flag of a request with one item, if any, out of its `tensors`."""
    names = [state.spec.name for state in signature.state if state.spec.name in tensors]
    flag = tensors.pop(IS_INIT.name, None)
    return {name: tensors.pop(name) for name in names} or None, None if flag is None else bool(flag[0])


def response_prefix(status: int, headers: Headers) -> bytes:
    """The status line and the server's own headers, as uvicorn writes them."""
    return STATUS_LINE[status] + b"".join(b"%s: %s\r\n" % field for field in headers)


def serialised(response: Response, headers: Headers) -> bytes:
    """A response as uvicorn writes it."""
    fields = b"".join(b"%s: %s\r\n" % field for field in response.raw_headers)
    return response_prefix(response.status_code, headers) + fields + b"\r\n" + bytes(response.body)
