"""Flags: boolean tensors of items, (B,), and of their elements, (B, ...)."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def every(flags: Tensor) -> Tensor:
    """(B, ...) bool -> (B,): whether all of an item are true."""
    return flags.flatten(1).all(1) if flags.ndim > 1 else flags


def all_of(flags: list[Tensor]) -> Tensor:
    """(B,) bool: whether all of the given flags, (B,) each and at least one, are true."""
    return reduce(torch.logical_and, flags)


def wide(flags: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), to choose whole items of `like`."""
    return flags.reshape(-1, *[1] * (like.ndim - 1))
