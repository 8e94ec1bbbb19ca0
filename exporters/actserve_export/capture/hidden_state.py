"""Finds state that a policy hides: buffers and attributes that a run changes.

A program has no hidden state: what one request changed would change another client's actions. Buffers that only change
in training mode, such as those of `BatchNorm`, do not change here, because the policy runs in evaluation mode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actserve.core.errors import CaptureFailed

_LIBRARIES = ("actserve_export", "torch", "torchrl", "tensordict")  # their objects hide no state of the policy
_VALUES = (bool, int, float, str, bytes, Tensor)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
# Of every module; and the list of its own parameters that a recurrent module of torch rebuilds.
_OF_MODULES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "_flat_weights"}


def refuse_hidden_state(policy: nn.Module, run: Callable[[], Any]) -> None:
    """Run the policy twice, on inputs that differ. Raises `CaptureFailed` with the buffers and attributes that change.

    The first run may create caches: a new attribute, or one that was None, is not reported for it.
    """
    before = _snapshot(policy)
    run()
    first = _snapshot(policy)
    run()
    changed = _changed(before, first) | _changed(first, _snapshot(policy), new=True)
    _restore(policy, before)
    if changed:
        raise CaptureFailed(refusal(sorted({path.removeprefix("module.").removeprefix("module.") for path in changed})))


def refusal(names: list[str]) -> str:
    """The message for a policy that changes `names`, buffers and attributes by their paths."""
    return (
        f"the policy changes {', '.join(names)} when it acts, and a program has no hidden state: "
        "freeze it (stop the update in evaluation mode), or declare it as state (a key that the policy reads, "
        'and writes as ("next", key))'
    )


def _snapshot(policy: nn.Module) -> dict[str, Any]:
    """Parameters, buffers and attributes of all modules, by path; tensors are copies."""
    found: dict[str, Any] = {}
    for path, module in policy.named_modules():
        prefix = f"{path}." if path else ""
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        plain = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        for name, value in (tensors | _of_class(module) | plain).items():
            for inner, kept in _copies(value):
                found[prefix + name + inner] = kept
    return found


def _of_class(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of the module's own class, which it may change as well."""
    return {name: value for name, value in vars(type(module)).items() if isinstance(value, (*_VALUES, *_CONTAINERS))}


def _copies(value: Any, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """(path below `value`, copy) of a value that can be compared later, or of the attributes of a plain object."""
    if (kept := _copy(value)) is not None:
        yield "", kept
    elif depth and not callable(value) and type(value).__module__.partition(".")[0] not in _LIBRARIES:
        for name, attribute in getattr(value, "__dict__", {}).items():
            for inner, copied in _copies(attribute, depth - 1):
                if isinstance(copied, (bool, int, float, str)):  # tensors there are results, such as a distribution's
                    yield f".{name}{inner}", copied


def _copy(value: Any) -> Any:
    """A copy of a number, text, tensor or array, or a container of them; None for anything else."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Parameter, nn.Buffer) and not value.is_meta
        return value.detach().clone() if plain else None
    if isinstance(value, np.ndarray):
        return value.copy() if value.dtype.kind in "biuf" else None
    if isinstance(value, _CONTAINERS):
        entries = list(value.items()) if isinstance(value, dict) else list(value)
        flat = [part for entry in entries for part in (entry if isinstance(entry, tuple) else (entry,))]
        return [_copy(part) for part in flat] if all(isinstance(part, _VALUES) for part in flat) else None
    return value if isinstance(value, _VALUES) else None


def _changed(before: dict[str, Any], after: dict[str, Any], new: bool = False) -> set[str]:
    """The paths whose values differ; with `new`, those that appear, too."""
    both = {path for path in before.keys() & after.keys() if not _same(before[path], after[path])}
    return both | (after.keys() - before.keys() if new else set())


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or one != one


def _restore(policy: nn.Module, before: dict[str, Any]) -> None:
    """Give parameters and buffers the values of `before`."""
    with torch.no_grad():
        for path, tensor in (*policy.named_parameters(), *policy.named_buffers()):
            if path in before:
                tensor.copy_(before[path])
