"""Which requests the lane takes: a strict reader of request heads.

A head is either understood in full or not taken; there is no third case, and so nothing in it that this file and
uvicorn's parser could read differently. Clients send the same head again and again: what was read is remembered by its
bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from actserve.server.access.tokens import Token

MAX_BYTES = 4096  # of a head; longer ones are not taken
MAX_CODED_BYTES = 1 << 15  # of a compressed body, which is read with its head
REMEMBERED = 1024  # heads

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")  # visible ASCII, spaces between
_LENGTH = re.compile(rb"[1-9][0-9]{0,9}")
_PATIENCE = re.compile(rb"[1-9][0-9]{0,6}")
_BEGINNING = re.compile(rb"(?:[\x20-\x7e]*\r\n)*[\x20-\x7e]*\r?")
_IGNORED = {b"host", b"user-agent", b"accept-encoding", b"accept-language"}  # change nothing about an answer
_ONLY: dict[bytes, set[bytes]] = {
    b"content-type": {b"application/octet-stream"},
    b"accept": {b"*/*", b"application/json"},
    b"connection": {b"keep-alive"},
}

Door = TypeVar("Door")
FindToken = Callable[[bytes | None], Token | None]  # whose an Authorization header is


@dataclass(frozen=True, slots=True)
class BodySize:
    """Of the bodies that a door takes."""

    item_bytes: int
    items: int  # at most


@dataclass(frozen=True, slots=True)
class RequestHead(Generic[Door]):
    """What a head asks for."""

    door: Door
    patience_ns: int  # how long it would wait; 0: for ever
    body_bytes: int
    items: int  # in the body; 0: as many as there are once it is expanded
    token: Token | None = None  # whose it is


def may_become_a_head(data: bytes) -> bool:
    """Whether something that the lane takes can begin with `data`: all else is for uvicorn's parser at once."""
    return len(data) < MAX_BYTES and data.startswith(b"POST "[: len(data)]) and bool(_BEGINNING.fullmatch(data))


class HeadParser(Generic[Door]):
    """Reads heads of POST requests to `doors`, which are by path, with bodies as `sizes` has it. `find_token`: nobody
    is let in without a token; None: it does not matter."""

    def __init__(
        self, doors: Mapping[bytes, Door], sizes: Mapping[bytes, BodySize], find_token: FindToken | None = None
    ) -> None:
        self._doors, self._sizes, self._find_token = doors, sizes, find_token
        self._known: dict[bytes, RequestHead[Door] | None] = {}

    def find(self, head: bytes) -> RequestHead[Door] | None:
        """`head` with its final empty line -> what it asks for; None: not for the lane."""
        try:
            return self._known[head]
        except KeyError:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            found = self._known[head] = self._read(head)
            return found

    def _read(self, head: bytes) -> RequestHead[Door] | None:
        request, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        method, _, rest = request.partition(b" ")
        path, _, version = rest.partition(b" ")
        if (method, version) != (b"POST", b"HTTP/1.1") or path not in self._doors:
            return None
        found: dict[bytes, bytes] = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            value = value.lstrip(b" ")  # uvicorn's parser leaves what is behind it
            name = name.lower()
            if not (colon and _TOKEN.fullmatch(name) and _VALUE.fullmatch(value)) or name in found:
                return None
            found[name] = value
        length, kind = found.pop(b"content-length", b""), found.get(b"content-type")
        if kind is None or b"host" not in found or not _LENGTH.fullmatch(length):
            return None
        coding, patience = found.pop(b"content-encoding", None), found.pop(b"x-deadline-ms", None)
        if patience is not None and not _PATIENCE.fullmatch(patience):
            return None
        token, authorization = None, found.pop(b"authorization", None)
        if self._find_token is not None:
            token = self._find_token(authorization)
            if token is None:
                return None
        for name, value in found.items():
            if name not in _IGNORED and value not in _ONLY.get(name, ()):
                return None
        size, body_bytes = self._sizes[path], int(length)
        items, beside = divmod(body_bytes, size.item_bytes)
        if coding is not None:
            if coding != b"zstd" or body_bytes > MAX_CODED_BYTES:
                return None
            items = 0
        elif beside or items > size.items:
            return None
        return RequestHead(self._doors[path], int(patience or 0) * 1_000_000, body_bytes, items, token)
