"""msgpack messages with arrays, in the forms that robots' stacks use.

A message is read within bounds: no extension types, a bounded number of values in a list, of names in a map, and of
lists and maps together. Nothing larger than the message is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
MAX_IN_PLACE = 1024  # values
MAX_DEPTH = 32
MAX_KEPT = 256  # names, or kinds of arrays, of one packer
_MAP, _MAPS = 0x80, (0xDE, 0xDF)  # the first byte of a map: with its length in 4 bits, and otherwise
_LIST, _LISTS = 0x90, (0xDC, 0xDD)
_packer = msgpack.Packer()
_map_header: Callable[[int], bytes] = _packer.pack_map_header
_pack_value: Callable[[Any], bytes] = _packer.pack
_ARRAYS = (np.ndarray, np.generic)
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


def unpack_in_place(message: memoryview) -> Any:
    """As `unpack`, for a message that it has unpacked before: the arrays are views of `message`.

    This takes longer than `unpack`. Raises `MalformedBody` for more than `MAX_IN_PLACE` values, or deep lists and maps.
    """
    unpacker = msgpack.Unpacker(raw=False, max_buffer_size=len(message))
    unpacker.feed(message)
    left = MAX_IN_PLACE

    def value(depth: int) -> Any:
        nonlocal left
        left -= 1
        if not left or not depth:
            raise MalformedBody("expected a message with few values, in place")
        kind = message[unpacker.tell()]
        if kind & 0xF0 == _MAP or kind in _MAPS:
            return _value({unpacker.unpack(): value(depth - 1) for _ in range(unpacker.read_map_header())})
        if kind & 0xF0 == _LIST or kind in _LISTS:
            return [value(depth - 1) for _ in range(unpacker.read_array_header())]
        found = unpacker.unpack()
        end = unpacker.tell()
        return message[end - len(found) : end] if isinstance(found, bytes) else found

    return value(MAX_DEPTH)


def pack(content: Any, encode: Callable[[Array], Any]) -> bytes:
    """The message; `encode` turns an array into what msgpack has."""
    message: bytes = msgpack.packb(content, default=encode)
    return message


class MapPacker:
    """As `pack`, for maps that are mostly alike. Names are packed once. For an array of one name, dtype and shape, the
    bytes before and after its data are packed once.
    """

    def __init__(self, encode: Callable[[Array], Any]) -> None:
        self._encode = encode
        self._names: dict[str, bytes] = {}
        self._around: dict[tuple[str, np.dtype[Any], tuple[int, ...]], tuple[bytes, bytes]] = {}

    def __call__(self, content: Mapping[str, Any]) -> bytes:
        parts: list[bytes] = []
        self._add(content, parts)
        return b"".join(parts)

    def _add(self, content: Mapping[str, Any], parts: list[bytes]) -> None:
        parts.append(_map_header(len(content)))
        for name, value in content.items():
            if isinstance(value, _ARRAYS):
                around = self._around.get((name, value.dtype, value.shape)) or self._pack_around(name, value)
                parts += (around[0], value.tobytes(), around[1])
                continue
            parts.append(self._names.get(name) or self._pack_name(name))
            if isinstance(value, dict):
                self._add(value, parts)
            else:
                parts.append(_pack_value(value))

    def _pack_name(self, name: str) -> bytes:
        if len(self._names) >= MAX_KEPT:
            self._names.clear()
        packed = self._names[name] = _pack_value(name)
        return packed

    def _pack_around(self, name: str, array: Array | np.generic) -> tuple[bytes, bytes]:
        """The bytes before and after the data of an array of this name, dtype and shape."""
        if len(self._around) >= MAX_KEPT:
            self._around.clear()
        zeros = np.zeros(array.shape, array.dtype)
        data = _pack_value(zeros.tobytes())
        before, _, after = pack(zeros, self._encode).partition(data)
        around = (_pack_value(name) + before + data[: len(data) - zeros.nbytes], after)
        self._around[(name, array.dtype, array.shape)] = around
        return around


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
