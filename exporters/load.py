"""Names and import paths -> PolicySource."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from app.errors import CaptureFailed, UsageError
from app.lazy import resolve
from app.signature import Array
from exporters.policies import expected, find
from exporters.source import PolicySource


def load(target: str, checkpoint: Path | None = None) -> tuple[str, PolicySource]:
    """(artifact name, source) for a known policy's name or a ``module:factory``; weights from `checkpoint` if given.

    Raises `UsageError` for what cannot be found and `CaptureFailed` for a factory that gives something else.
    """
    known = find(target)
    path = known.factory if known else target
    if ":" not in path:
        raise UsageError(f"expected {expected()}, or module:factory; got {target!r}")
    if known and not known.weights_ship and checkpoint is None:
        raise UsageError(
            f"no weights of {target} ship: train it (actserve train {target}), then export it with --checkpoint"
        )
    sys.path.insert(0, str(Path.cwd()))  # the user's own module is where the user stands
    try:
        made = resolve(path)(*(known.arguments if known else ()))
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{target!r} cannot be imported: {error}") from error
    finally:
        sys.path.pop(0)
    source = _as_source(target, made)
    if checkpoint is not None:
        _restore(source, checkpoint)
    name = target if known else path.partition(":")[2]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), source


def _as_source(target: str, made: object) -> PolicySource:
    if isinstance(made, PolicySource):
        return made
    if isinstance(made, tuple) and len(made) == 2:
        policy, example = made
        if isinstance(policy, TensorDictModuleBase) and isinstance(example, TensorDict):
            return PolicySource(policy, example)
    raise CaptureFailed(
        f"{target} must return (tensordict module, TensorDict) or a PolicySource; got {type(made).__name__}"
    )


def _restore(source: PolicySource, checkpoint: Path) -> None:
    try:
        weights = load_file(checkpoint)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{checkpoint} is not a safetensors file that can be read: {error}") from None
    try:
        (source.weights or source.policy).load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{checkpoint} does not fit the policy: {error}") from None


def actor(target: str) -> Callable[[Array], int]:
    """The policy as TorchRL runs it, called with one observation after the other of one episode; for comparisons.

    Each without a batch axis. What the policy writes for its next step it is given there.
    """
    _, source = load(target)
    torch.set_num_threads(1)
    (name,) = (key for key in source.policy.in_keys if key not in _carried(source))
    carried = source.example.exclude(name).set("is_init", torch.ones(1, dtype=torch.bool))

    def act(observation: Array) -> int:
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            seen = source.policy(carried.clone().set(name, torch.from_numpy(observation)))
            if "next" in seen:
                carried.update(seen["next"]).set("is_init", torch.zeros(1, dtype=torch.bool))
            return int(seen[source.outputs[0]])

    return act


def _carried(source: PolicySource) -> set[str]:
    """The inputs that a policy writes itself, and the reset flag."""
    return {"is_init"} | {key[1] for key in source.policy.out_keys if isinstance(key, tuple)}
