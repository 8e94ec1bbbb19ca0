"""bfloat16, which numpy lacks: the upper half of a float32.

Arrays hold bfloat16 tensors as float32, which can express each of their values. Bodies hold the upper halves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = float.fromhex("0x1.fep127")
EPSILON = 2.0**-7  # the distance from 1 to the next larger number


def narrow(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The halves of numbers of any shape, rounded to the nearest, and to the even one of two."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def widen(halves: NDArray[Any]) -> NDArray[np.float32]:
    """The numbers of halves, of the same shape."""
    return (halves.astype(np.uint32) << 16).view(np.float32)
