"""TensorDicts -> named arrays and back, without torch: numpy can read a CPU tensor directly."""

from __future__ import annotations

from typing import Any

import numpy as np

from actserve.core.errors import UsageError
from actserve.core.signature import Arrays, Signature, TensorSpec


def read_tensordict(tensordict: Any, signature: Signature) -> Arrays:
    """The inputs of `signature` from `tensordict`: (*shape) for batch size [], (k, *shape) for [k].

    Nested keys join with `_`. State and `is_init` may be missing. Raises `UsageError` for a missing observation.
    """
    batch = tuple(tensordict.batch_size)
    if len(batch) > 1:
        raise UsageError(f"expected a TensorDict of batch size [] or [k]; got {list(batch)}")
    found = {_joined_key(key): key for key in tensordict.keys(include_nested=True, leaves_only=True)}
    missing = [spec.name for spec in signature.observations if spec.name not in found]
    if missing:
        raise UsageError(
            f"expected {', '.join(missing)} in the TensorDict; got {', '.join(sorted(found)) or 'nothing'}"
        )
    return {
        spec.name: _array(tensordict[found[spec.name]], spec, batch)
        for spec in signature.request_inputs
        if spec.name in found
    }


def write_tensordict(tensordict: Any, results: Arrays, signature: Signature) -> Any:
    """Set the outputs under their names, and new state under ``("next", name)``; returns `tensordict`."""
    states = {state.spec.name for state in signature.state}
    dtypes = {spec.name: spec.dtype for spec in signature.answers}
    for name, array in results.items():
        key = ("next", name) if name in states else name
        tensordict[key] = array
        if dtypes[name] == "bfloat16":
            tensordict[key] = tensordict[key].bfloat16()
    return tensordict


def _array(tensor: Any, spec: TensorSpec, batch: tuple[int, ...]) -> Any:
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().float() if spec.dtype == "bfloat16" else tensor.detach()
    array = np.asarray(tensor)
    try:
        return array.reshape((*batch, *spec.shape))  # TorchRL's flags have the shape (*batch, 1)
    except ValueError:
        raise UsageError(f"{spec.name}: expected {spec} for batch size {list(batch)}; got {array.shape}") from None


def _joined_key(key: str | tuple[str, ...]) -> str:
    return key if isinstance(key, str) else "_".join(key)
