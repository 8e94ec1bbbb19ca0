"""Reads and writes large JSON in pieces, so that a thread that does so lets the event loop run.

One call of the JSON library holds Python's interpreter lock for as long as it takes: 5 MB of numbers are 0.3 s, in
which the event loop would answer nobody, in whichever thread the call is made. So the text is cut between elements, and
each piece of at most `PIECE_BYTES` is read by a call of its own. The result is that of one call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydantic_core

from actserve.core.signature import Array

PIECE_BYTES = 1 << 14  # about a millisecond
PIECE_VALUES = 1 << 13
MAX_DEPTH = 200  # of pydantic_core, too
_OPENING, _CLOSING, _COMMA = b"[{", b"]}", ord(",")
_NAME = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:', re.DOTALL)


def load(text: bytes) -> Any:
    """The document. Raises `ValueError`."""
    if len(text) <= PIECE_BYTES:
        return pydantic_core.from_json(text, allow_inf_nan=False)
    return _Pieces(text).load()


def dump(array: Array) -> bytes:
    """Nested lists, as `pydantic_core.to_json(array.tolist(), inf_nan_mode="strings")`."""
    if array.size <= PIECE_VALUES or not array.ndim:
        return pydantic_core.to_json(array.tolist(), inf_nan_mode="strings")
    items = max(1, PIECE_VALUES * len(array) // array.size)
    if items == 1 and array.ndim > 1:
        return b"[" + b",".join(map(dump, array)) + b"]"
    parts = (array[start : start + items] for start in range(0, len(array), items))
    return b"[" + b",".join(pydantic_core.to_json(part.tolist(), inf_nan_mode="strings")[1:-1] for part in parts) + b"]"


def pieces(values: list[Any]) -> Iterator[list[Any]]:
    """The values in lists of at most `PIECE_VALUES`. Empties `values`, because freeing a long list takes long too."""
    values.reverse()
    while values:
        piece = values[-PIECE_VALUES:]
        del values[-PIECE_VALUES:]
        piece.reverse()
        yield piece


class _Pieces:
    """A text with the brackets and commas outside of its strings: `_at[i]` is the position of the i-th of them, `_kind`
    its character and `_depth` the number of open brackets behind it."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        characters = np.frombuffer(text, np.uint8)
        at = np.flatnonzero(_TABLE[characters] != 0)
        quotes = _quotes(text, characters)
        outside = np.searchsorted(quotes, at) % 2 == 0
        self._at = at[outside]
        self._kind = characters[self._at]
        self._depth = np.cumsum(_TABLE[self._kind].astype(np.int32) % 3 - 1)  # of opening, comma, closing: 1, 0, -1

    def load(self) -> Any:
        if not len(self._at):  # one long text or number
            return pydantic_core.from_json(self._text, allow_inf_nan=False)
        last = len(self._at) - 1
        if self._depth[last] != 0 or self._depth.min() < 0 or self._depth.max() > MAX_DEPTH:
            raise ValueError("its brackets do not match, or it is too deep")
        if np.count_nonzero(self._depth == 0) != 1:
            raise ValueError("expected one value")
        self._expect_blank(0, self._at[0])
        self._expect_blank(self._at[last] + 1, len(self._text))
        return self._container(0, last)

    def _container(self, first: int, last: int) -> Any:
        """The list or object between two brackets."""
        opening, closing = self._kind[first], self._kind[last]
        if self._at[last] - self._at[first] <= PIECE_BYTES:
            return pydantic_core.from_json(self._text[self._at[first] : self._at[last] + 1], allow_inf_nan=False)
        if closing != opening + 2:  # [ and ], { and } in ASCII
            raise ValueError("its brackets do not match")
        is_object = opening == _OPENING[1]
        inner = slice(first + 1, last)
        commas = first + 1 + np.flatnonzero((self._depth[inner] == self._depth[first]) & (self._kind[inner] == _COMMA))
        ends = [first, *commas.tolist(), last]
        at = self._at[ends]
        values: list[Any] = []
        named: dict[str, Any] = {}
        start = 0
        while start < len(ends) - 1:
            stop = int(np.searchsorted(at, at[start] + PIECE_BYTES, "right")) - 1
            if stop > start:
                piece = self._text[at[start] + 1 : at[stop]]
                if not piece.strip():
                    raise ValueError("expected a value before a comma or a closing bracket")
                if is_object:
                    named.update(pydantic_core.from_json(b"{" + piece + b"}", allow_inf_nan=False))
                else:
                    values += pydantic_core.from_json(b"[" + piece + b"]", allow_inf_nan=False)
                start = stop
                continue
            begin, end = int(at[start]) + 1, int(at[start + 1])
            if is_object:
                name = _NAME.match(self._text, begin, end)
                if name is None:
                    raise ValueError("expected a name and a colon")
                key = pydantic_core.from_json(name[1])
                named[key] = self._element(ends[start] + 1, ends[start + 1], name.end(), end)
            else:
                values.append(self._element(ends[start] + 1, ends[start + 1], begin, end))
            start += 1
        return named if is_object else values

    def _element(self, first: int, stop: int, begin: int, end: int) -> Any:
        """The value in the text from `begin` to `end`, which has the brackets and commas from `first` to `stop`."""
        if first == stop:
            return pydantic_core.from_json(self._text[begin:end], allow_inf_nan=False)
        self._expect_blank(begin, self._at[first])
        self._expect_blank(self._at[stop - 1] + 1, end)
        return self._container(first, stop - 1)

    def _expect_blank(self, begin: int, end: int) -> None:
        if self._text[begin:end].strip(b" \t\r\n"):
            raise ValueError("expected a comma or a closing bracket between two values")


def _quotes(text: bytes, characters: Array) -> Array:
    """The positions of the quotes that begin or end a string."""
    quotes = np.flatnonzero(characters == ord('"'))
    if b"\\" not in text:
        return quotes
    return np.array([at for at in quotes.tolist() if not _is_escaped(text, at)], np.intp)


def _is_escaped(text: bytes, at: int) -> bool:
    before = at
    while before and text[before - 1] == ord("\\"):
        before -= 1
    return (at - before) % 2 == 1


_TABLE = np.zeros(256, np.uint8)
_TABLE[list(_OPENING)], _TABLE[_COMMA], _TABLE[list(_CLOSING)] = 2, 1, 3
