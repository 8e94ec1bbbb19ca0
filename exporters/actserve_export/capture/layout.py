"""Layout: the keys of a tensordict policy, sorted into observations, state and outputs, each with its name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict, TensorDictBase, is_non_tensor
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.envs.transforms import Transform
from torchrl.modules import QValueModule

from actserve.core.errors import CaptureFailed
from actserve.core.signature import IS_INIT
from actserve_export.capture.episode import Primed
from actserve_export.capture.steps import StepModule
from actserve_export.capture.swaps import SwappedCompose, reads_and_writes
from actserve_export.sources.keys import Key, key_name, keys_by_name, last_part, next_key
from actserve_export.sources.policy_source import PolicySource

log = logging.getLogger("actserve")

# Outputs that the program returns besides the action, if the policy writes them.
KNOWN_OUTPUTS = ("action_value", "logits", "loc", "scale", "state_value", "action_log_prob", "sample_log_prob")
Initial = float | tuple[float, ...]


@dataclass(frozen=True)
class Layout:
    """The keys of the program's tensors in the policy's tensordict."""

    observations: dict[str, Key]  # by name
    states: dict[str, tuple[Key, Key]]  # name -> (the key read, the key written)
    initial: dict[str, Initial]  # of each state, from the example
    outputs: dict[str, Key]
    is_init: bool  # the policy itself reads "is_init"
    is_init_shape: tuple[int, ...]
    groups: dict[Key, tuple[int, ...]]  # nested tensordicts -> their batch size, such as the agents of a group
    fixed: dict[Key, Any]  # what is no tensor, such as an instruction: as in the example

    def tensordict(self, tensors: Mapping[str, Tensor], batch: Any) -> TensorDict:
        """The tensordict that the policy gets: observations and state by name, (B, *shape) each."""
        tensordict = TensorDict({}, batch_size=[batch])
        for key, size in self.groups.items():
            tensordict.set(key, TensorDict({}, batch_size=[batch, *size]))
        for name, key in (self.observations | {name: read for name, (read, _) in self.states.items()}).items():
            tensordict.set(key, tensors[name])
        for key, value in self.fixed.items():
            tensordict.set_non_tensor(key, value)
        return tensordict


def layout_of(source: PolicySource, policy: nn.Module) -> Layout:
    """Sort the policy's keys into observations, state and outputs."""
    steps = modules_in_order(policy)
    reads, writes = reads_and_writes(steps)
    # The environment gives the previous action: a policy that reads it does not carry it.
    actions = set(_actions(source.policy, steps))
    carried = {key for step in steps if not _prepares(step) for key in step.out_keys} - actions
    carried |= {
        key for each in steps if isinstance(each, Primed) for key in each.carried if next_key(key) not in carried
    }
    present = set(source.example.keys(include_nested=True, leaves_only=True))
    fixed = {key: value.tolist() for key in reads if is_non_tensor(value := source.example.get(key, None))}
    for key, value in fixed.items():
        log.warning("%s is no tensor, and fixed in the program: %r", key_name(key), value)
    needed = [key for key in reads if last_part(key) != IS_INIT.name and key not in fixed]
    if missing := [key for key in needed if key not in present]:
        raise CaptureFailed(f"the policy reads {missing}, which the example lacks; it has {sorted(map(str, present))}")
    written = {key: after for key in needed for after in (next_key(key), key) if after in carried and after in writes}
    if needed and len(written) == len(needed):
        raise CaptureFailed(f"the policy overwrites everything that it reads ({needed}): expected an observation, too")
    names = {
        f"previous_{name}" if key in actions & written.keys() else name: key
        for name, key in keys_by_name(needed, "input", rename=True).items()
    }
    init = source.example.get(IS_INIT.name, None)
    return Layout(
        observations={name: key for name, key in names.items() if key not in written},
        states={name: (key, written[key]) for name, key in names.items() if key in written},
        initial={name: _initial(source.example.get(key)) for name, key in names.items() if key in written},
        outputs=_output_names(
            source.outputs or _outputs(source.policy, steps, set(written.values()) - actions),
            {name for name, key in names.items() if key in written},
        ),
        is_init=len(needed) + len(fixed) < len(reads),
        is_init_shape=() if init is None else tuple(init.shape),
        groups=_groups(source.example),
        fixed=fixed,
    )


def _groups(example: TensorDictBase) -> dict[Key, tuple[int, ...]]:
    """The nested tensordicts of an item that have a batch size of their own, outermost first."""
    nested = {key: example.get(key) for key in example.keys(include_nested=True)}
    return {
        key: tuple(value.batch_size[example.batch_dims :])
        for key, value in nested.items()
        if isinstance(value, TensorDictBase) and value.batch_dims > example.batch_dims
    }


def _output_names(keys: Sequence[Key], states: set[str]) -> dict[str, Key]:
    """name -> key. An output of the same name as a state is called NAME_out: an answer carries both."""
    named = keys_by_name(keys, "output", rename=True)
    return {f"{name}_out" if name in states else name: key for name, key in named.items()}


def _prepares(step: Any) -> bool:
    """Whether a step prepares observations: a transform, or a module that only overwrites keys that it reads.

    A module that carries state writes more than its state, or writes it as ("next", key).
    """
    return isinstance(step, (Transform, StepModule)) or set(step.out_keys) <= set(step.in_keys)


def _initial(value: Tensor) -> Initial:
    """The value of a state in the example, with which episodes begin."""
    flat = tuple(map(float, value.reshape(-1).tolist()))
    return flat[0] if flat and len(set(flat)) == 1 else flat or 0.0


def modules_in_order(policy: nn.Module) -> list[Any]:
    """The tensordict modules that a policy runs, in order."""
    children = policy.module if isinstance(policy, TensorDictSequential) else None
    children = policy.steps if isinstance(policy, SwappedCompose) else children
    if children is None:
        return [policy]
    return [found for child in children for found in modules_in_order(child)]


def _outputs(policy: Any, steps: list[Any], state: set[Key]) -> list[Key]:
    """The actions first, then `KNOWN_OUTPUTS`. A policy without an action gives all its outputs."""
    state = state | {key for step in steps for key in getattr(step, "state_keys", ())}
    written = [key for key in policy.out_keys if key not in state and key_name(key) not in map(key_name, state)]
    named = [key for key in written if last_part(key) == "action"]
    sampled = [key for key in _sampled(steps) if key in written and key not in named]
    actions = [*named, *sampled] or [key for key in _chosen(steps, written) if key in written]
    known = [key for key in written if _known(key) and key not in actions]
    return [*actions, *known] if actions else written


def _known(key: Key) -> bool:
    return last_part(key) in KNOWN_OUTPUTS or last_part(key).endswith("_log_prob")


def _sampled(steps: list[Any]) -> list[Key]:
    """The keys that modules draw and no later one reads: the parts of an action that has several."""
    found: list[Key] = []
    for step in reversed(steps):
        found = [key for key in found if key not in step.in_keys]
        if isinstance(step, ProbabilisticTensorDictModule):
            found = [*step.dist_sample_keys, *found]
    return found


def _actions(policy: Any, steps: list[Any]) -> list[Key]:
    """The keys of the action: those called "action", or else those that a module which chooses actions writes."""
    written = list(policy.out_keys)
    return [key for key in written if last_part(key) == "action"] or _chosen(steps, written)


def _chosen(steps: list[Any], written: list[Key]) -> list[Key]:
    """The keys that the last module which chooses an action writes it to, whatever they are called."""
    keys: list[Key]
    for step in reversed(steps):
        if isinstance(step, ProbabilisticTensorDictModule):
            keys = list(step.dist_sample_keys)
        elif isinstance(step, QValueModule):
            keys = list(step.out_keys[:1])
        else:
            keys = [key for key in (getattr(step, name, None) for name in ("action_key", "key")) if key is not None]
        if keys and all(key in written for key in keys):
            return keys
    return []
