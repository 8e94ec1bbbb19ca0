"""Blocks: memory for copies of large tensors that is used again. Fresh memory costs a page fault for each 4 KB."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from actserve.core.signature import Array

LARGE_BYTES = 4096
SPARE_BYTES = 16 << 20  # kept for the next copies


class Blocks:
    """The event loop takes blocks for its copies, and the writer's thread gives them back."""

    def __init__(self) -> None:
        self._spare: dict[int, deque[Array]] = {}  # by size in bytes

    def copy(self, array: Array) -> Array:
        """A copy of `array`, in a spare block if there is one."""
        spare = self._spare.get(array.nbytes)
        if not spare:
            return array.copy()
        copied = spare.pop().view(array.dtype).reshape(array.shape)
        np.copyto(copied, array)
        return copied

    def give_back(self, arrays: Iterable[Array]) -> None:
        """Keep the memory of copies that were written."""
        for array in arrays:
            if array.nbytes >= LARGE_BYTES:
                spare = self._spare.setdefault(array.nbytes, deque(maxlen=max(1, SPARE_BYTES // array.nbytes)))
                spare.append(array.reshape(-1).view(np.uint8))
