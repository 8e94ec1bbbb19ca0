"""msgpack messages with arrays, in the forms that robots' stacks use.

A message is read within bounds: no extension types, a bounded number of values in a list, of names in a map, and of
lists and maps together. Nothing larger than the message is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from actserve.core.errors import MalformedBody, one_line
from actserve.core.signature import Array
from actserve.server.protocols.robots import arrays
from actserve.wire.payload import Body

MAX_LIST = 4096  # values; longer lists must be arrays
MAX_MAP = 1024  # names
MAX_CONTAINERS = 4096
_SCALARS: dict[str, type | tuple[type, ...]] = {"b": bool, "u": int, "i": int, "f": (int, float)}


def unpack(message: Body) -> Any:
    """The content of a message: arrays as NumPy arrays, encoded images as bytes. Raises `MalformedBody`."""
    left = MAX_CONTAINERS

    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise MalformedBody(f"expected at most {MAX_CONTAINERS:,} lists and maps in a message; got more")
        return container

    try:
        return msgpack.unpackb(
            message,
            raw=False,
            object_hook=lambda found: _value(count(found)),
            list_hook=count,
            ext_hook=_refuse_extension,
            max_array_len=MAX_LIST,
            max_map_len=MAX_MAP,
            max_ext_len=0,
        )
    except MalformedBody:
        raise
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise MalformedBody(f"expected a msgpack message; got something else: {one_line(error)}"[:300]) from None


def pack(content: Any, encode: Callable[[Array], Any]) -> bytes:
    """The message; `encode` turns an array into what msgpack has."""
    message: bytes = msgpack.packb(content, default=encode)
    return message


def of_openpi(array: Array) -> dict[bytes, Any]:
    """An array, as openpi-client reads it."""
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def of_vla_eval(array: Array) -> dict[str, Any]:
    """An array, as vla-eval reads it."""
    return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": array.shape}


def of_gr00t(array: Array) -> dict[str, Any]:
    """An array, as GR00T's clients read it."""
    return {"__ndarray_class__": True, "as_npy": arrays.to_npy(array)}


def _refuse_extension(code: int, _data: bytes) -> Any:
    raise MalformedBody(f"expected msgpack without extension types; got type {code}")


def _value(found: dict[Any, Any]) -> Any:
    """The array or the image that a map is, or the map."""

    def field(name: str) -> Any:
        return found.get(name, found.get(name.encode()))

    if field("__ndarray__"):
        return arrays.from_bytes(field("data"), field("dtype"), field("shape"))
    if field("__npgeneric__"):
        return _scalar(field("data"), field("dtype"))
    if field("__image__") and field("format") == "raw":
        return arrays.from_bytes(field("data"), field("dtype"), field("shape"))
    if field("__image__"):
        if not isinstance(field("data"), bytes):
            raise MalformedBody(f"expected the bytes of an image; got {type(field('data')).__name__}")
        return field("data")
    if field("__ndarray_class__"):
        return arrays.from_npy(field("as_npy"))
    if field("nd") is True:  # msgpack-numpy
        return arrays.from_bytes(field("data"), field("type"), field("shape"))
    if field("nd") is False:
        return arrays.from_bytes(field("data"), field("type"), ())
    return found


def _scalar(value: Any, dtype: Any) -> Array:
    known = arrays.DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None or isinstance(value, bool) != (known.kind == "b") or not isinstance(value, _SCALARS[known.kind]):
        raise MalformedBody(f"expected a number of the dtype {dtype!r}; got {value!r}"[:200])
    try:
        return np.array(value, known)
    except OverflowError:
        raise MalformedBody(f"expected a number of the dtype {dtype!r}; got {value!r}"[:200]) from None
