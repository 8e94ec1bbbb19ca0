"""TensorDicts -> named arrays and back, without torch: numpy can read a CPU tensor directly."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from actserve.core.errors import UsageError
from actserve.core.signature import Array, Arrays, Exploration, Signature, TensorSpec

VERSION = "policy_version"  # TorchRL's key for the version of the policy that acted


def read_tensordict(tensordict: Any, signature: Signature) -> Arrays:
    """The inputs of `signature` from `tensordict`: (*shape) for batch size [], else (k, *shape) for its k items.

    Nested keys join with `_`. State and `is_init` may be missing. Raises `UsageError` for a missing observation.
    """
    batch = tuple(tensordict.batch_size)
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


def wanted_exploration(signature: Signature) -> Exploration | None:
    """What TorchRL's `set_exploration_type` says, if this policy can do it. None: act as by default."""
    tensordict = sys.modules.get("tensordict.nn.probabilistic")
    kind = None if tensordict is None else tensordict.interaction_type()
    if kind is None:
        return None
    wanted: Exploration = "random" if kind.value == "random" else "deterministic"
    return wanted if wanted in signature.exploration else None


def write_tensordict(tensordict: Any, results: Arrays, signature: Signature, version: int) -> Any:
    """Set the outputs, new state under "next", and the version that acted. Returns `tensordict`.

    The output `agents_action` goes to ``("agents", "action")`` if the TensorDict has a nested one of the name `agents`.
    """
    batch = tuple(tensordict.batch_size)
    nested = _nested_keys(tensordict)
    states = {state.spec.name for state in signature.state}
    dtypes = {spec.name: spec.dtype for spec in signature.answers}
    tensordict[VERSION] = np.full(batch, version)
    for name, array in results.items():
        group = next((key for joined, key in nested if name.startswith(f"{joined}_")), ())
        key = (*group, name[len("".join(f"{part}_" for part in group)) :])
        key = ("next", *key) if name in states else key
        tensordict[key] = array.reshape(*batch, *array.shape[1:]) if batch else array
        if dtypes[name] == "bfloat16":
            tensordict[key] = tensordict[key].bfloat16()
    return tensordict


def _nested_keys(tensordict: Any) -> list[tuple[str, tuple[str, ...]]]:
    """The keys of nested TensorDicts, joined and as they are; the longest first."""
    leaves = tensordict.keys(include_nested=True, leaves_only=True)
    groups = {key[:end] for key in leaves if isinstance(key, tuple) for end in range(1, len(key))}
    return sorted((("_".join(key), key) for key in groups if key[0] != "next"), reverse=True)


def _array(tensor: Any, spec: TensorSpec, batch: tuple[int, ...]) -> Array:
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().float() if spec.dtype == "bfloat16" else tensor.detach()
    array: Array = np.asarray(tensor)
    try:
        array = array.reshape((*batch, *spec.shape))  # TorchRL's flags have the shape (*batch, 1)
    except ValueError:
        raise UsageError(f"{spec.name}: expected {spec} for batch size {list(batch)}; got {array.shape}") from None
    return array.reshape((math.prod(batch), *spec.shape)) if batch else array


def _joined_key(key: str | tuple[str, ...]) -> str:
    return key if isinstance(key, str) else "_".join(key)
