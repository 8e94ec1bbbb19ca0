"""Codec: reads the requests of one kind, and writes their answers.

A kind is a URL and the headers that say how requests and answers are encoded: clients repeat them with each request.
"""

from __future__ import annotations

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
from actserve.wire.payload import Body

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


class Codec(Protocol):
    """`in_place`: a body is the bytes of observations, and is received into the memory of the next batch."""

    @property
    def endpoint(self) -> Endpoint: ...

    @property
    def in_place(self) -> bool: ...

    @property
    def max_items(self) -> int:
        """The largest batch; the routes take larger ones."""

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

    def refusal(self, error: ActserveError, headers: Headers, decoded: DecodedRequest | None = None) -> bytes:
        """The response to a request that raised `error`, which it counts."""


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
