"""The actions that limits apply to. `actserve compile` uses it without TorchRL."""

from __future__ import annotations

import numpy as np

from actserve.core.limits import OutputLimits
from actserve.core.signature import Signature, TensorSpec


def action_spec(signature: Signature, output: str) -> TensorSpec:
    """One action of an output: the output itself, or one entry of a chunk."""
    spec = next(spec for spec in signature.outputs if spec.name == output)
    return signature.planned_action if signature.chunk is not None and signature.chunk.output == output else spec


def taken_of_chunk(signature: Signature, output: str) -> int | None:
    """How many actions of a chunk are taken; None for an output that is no chunk."""
    chunk = signature.chunk
    return chunk.execute if chunk is not None and chunk.output == output else None


def starting_action(limit: OutputLimits, spec: TensorSpec) -> tuple[float, ...]:
    """The action that "hold" means in the first step: `start`, or the allowed values nearest to zero."""
    if limit.start is not None:
        return limit.start
    if limit.allowed is not None:
        return (float(limit.allowed[0]),) * spec.elements
    low, high = limit.low or (-np.inf,), limit.high or (np.inf,)
    nearest = np.broadcast_to(np.clip(0.0, low, high), (spec.elements,))
    return tuple(nearest.tolist())
