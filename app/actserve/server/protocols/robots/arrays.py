"""The arrays in robots' messages: bytes with a dtype and a shape, or a .npy file. Nothing is ever unpickled."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from actserve.core.errors import MalformedBody
from actserve.core.signature import Array
from actserve.wire.npy_header import read_header

DTYPES = {  # as NumPy writes them
    name: np.dtype(name)
    for name in ("|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8")
}
MAX_DIMENSIONS = 16


def from_bytes(data: Any, dtype: Any, shape: Any) -> Array:
    """A read-only view of little-endian, row-major `data`. Raises `MalformedBody`."""
    dtype = dtype.decode("latin-1") if isinstance(dtype, bytes) else dtype
    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        raise MalformedBody(f"expected a dtype of {', '.join(DTYPES)}; got {dtype!r}"[:200])
    if not isinstance(data, bytes | bytearray | memoryview):
        raise MalformedBody(f"expected the bytes of an array; got {type(data).__name__}")
    shape = check_shape(shape)
    size_bytes = known.itemsize * math.prod(shape)
    if len(data) != size_bytes:
        raise MalformedBody(f"expected {size_bytes:,} bytes for {dtype} of shape {shape}; got {len(data):,}"[:300])
    return np.frombuffer(data, known).reshape(shape)


def check_shape(shape: Any) -> Sequence[int]:
    """Raises `MalformedBody` unless `shape` is one."""
    is_list = isinstance(shape, list | tuple) and len(shape) <= MAX_DIMENSIONS
    if not is_list or not all(type(length) is int and 0 <= length < 2**40 for length in shape):
        raise MalformedBody(f"expected a shape, up to {MAX_DIMENSIONS} whole numbers; got {shape!r}"[:200])
    return tuple(shape)


def from_npy(body: Any) -> Array:
    """The array of a .npy file. Raises `MalformedBody`."""
    if not isinstance(body, bytes | memoryview):
        raise MalformedBody(f"expected the bytes of a .npy file; got {type(body).__name__}")
    header = read_header(body)
    shape = header.shape[::-1] if header.is_fortran else header.shape
    array = from_bytes(memoryview(body)[header.size :], header.descr, shape)
    return array.T if header.is_fortran else array


def to_npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.require(array, requirements="C"), allow_pickle=False)
    return file.getvalue()
