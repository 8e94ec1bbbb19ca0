"""Layout: where the arrays are in a message.

The messages of a robot mostly differ in the contents of their arrays alone. So the bytes around the arrays are compared
with those of a message that was unpacked before. If they are equal, the message means the same: it is not unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actserve.core.signature import Array

MAX_FIXED_BYTES = 16 << 10  # around the arrays of a message


class Layout:
    """The layout of `message`, (n,) uint8. `found` are values in it, by name, and `arrays` are all arrays in it.

    The contents of row-major views may change from message to message. All other values in `found` are constant.
    """

    def __init__(self, message: Array, found: Mapping[str, Any], arrays: Sequence[Array]) -> None:
        starts = {id(array): start for array in arrays if (start := _start(array, message)) is not None}
        self._size = len(message)
        self._fixed: list[tuple[int, int, bytes]] = []  # (start, end, bytes) around the arrays
        self._places = [
            (name, value.shape, value.dtype, starts[id(value)]) for name, value in found.items() if id(value) in starts
        ]
        self._values = {name: value for name, value in found.items() if id(value) not in starts}
        end = 0
        for start, size in sorted((starts[id(array)], array.nbytes) for array in arrays if id(array) in starts):
            self._fixed.append((end, start, message[end:start].tobytes()))
            end = start + size
        self._fixed.append((end, self._size, message[end:].tobytes()))

    @property
    def fixed_bytes(self) -> int:
        return sum(end - start for start, end, _ in self._fixed)

    def read(self, message: Array) -> dict[str, Any] | None:
        """The values in a message, (n,) uint8: arrays are views of it. None: its layout is another one."""
        if len(message) != self._size:
            return None
        data = message.data
        for start, end, fixed in self._fixed:
            if data[start:end] != fixed:
                return None
        found = self._values.copy()
        for name, shape, dtype, start in self._places:
            found[name] = np.ndarray(shape, dtype, data, start)
        return found


def _start(array: Array, message: Array) -> int | None:
    """The offset of a row-major view in `message`; None for other arrays."""
    start: int = array.__array_interface__["data"][0] - message.__array_interface__["data"][0]
    is_view = array.size > 0 and array.flags.c_contiguous and 0 <= start <= len(message) - array.nbytes
    return start if is_view else None
