"""torch's tensors <-> arrays of a signature, which hold bfloat16 as float32."""

from __future__ import annotations

import torch
from torch import Tensor

from actserve.core.signature import Array, TensorSpec


def to_tensor(array: Array, spec: TensorSpec) -> Tensor:
    """The tensor of the spec's dtype."""
    return torch.from_numpy(array).to(getattr(torch, spec.dtype))


def to_array(tensor: Tensor) -> Array:
    array: Array = widened(tensor.detach()).numpy()
    return array


def widened(tensor: Tensor) -> Tensor:
    """bfloat16 as float32; another tensor itself."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
