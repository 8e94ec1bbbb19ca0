"""The policy as it was given, without what the capture replaces in it."""

from __future__ import annotations

import torch
from tensordict.nn import set_composite_lp_aggregate
from torch import nn
from torchrl.envs.transforms import Transform
from torchrl.envs.utils import set_exploration_type

from actserve.core.signature import IS_INIT, Arrays, Exploration
from actserve_export.capture.layout import modules_in_order
from actserve_export.capture.step_io import StepIO
from actserve_export.capture.step_program import MODES
from actserve_export.capture.swaps import copy_of, swap
from actserve_export.capture.tensordict_policy import TracedPolicy
from actserve_export.capture.transforms import connect
from actserve_export.sources.interfaces import CapturedPolicy, ExportSource, OriginalPolicy
from actserve_export.sources.policy_source import PolicySource
from actserve_export.sources.tensors import to_array, to_tensor


def as_given(captured: CapturedPolicy, source: ExportSource) -> OriginalPolicy | None:
    """The user's own policy in its deterministic mode, to compare the captured one with.

    None if it cannot take a step of its own: it has no such mode or draws in it, the capture gave it state, or it has
    transforms, which may count what they see.
    """
    if not isinstance(captured, TracedPolicy) or not isinstance(source, PolicySource):
        return None
    signature, states = captured.signature, captured.layout.states
    if "deterministic" not in signature.exploration or signature.draws("deterministic"):
        return None
    if len(signature.state) != len(states):
        return None
    if _has_transforms(source.policy):
        return None
    policy = copy_of(source.policy).eval().cpu()
    return OriginalPolicy("the policy as it was given", lambda inputs: act(captured, policy, inputs, "deterministic"))


def as_trained(source: PolicySource, batch: int) -> nn.Module:
    """A copy of the policy that draws by itself, for the first step of `batch` episodes.

    Its transforms are replaced, because most run in an environment only.
    """
    if not _has_transforms(source.policy):
        return copy_of(source.policy).eval()
    io = StepIO()
    swapped = swap(source.policy, io, transforms_only=True).eval()
    connect(modules_in_order(swapped), source.example, io, source.outputs or ())
    io.begin(batch, None)
    return swapped


def _has_transforms(policy: nn.Module) -> bool:
    return any(isinstance(module, Transform) for module in policy.modules())


def act(captured: TracedPolicy, policy: nn.Module, inputs: Arrays, mode: Exploration) -> Arrays:
    """The outputs and the next state of one step of `policy`, which draws by itself. `inputs`: each (B, *shape)."""
    layout = captured.layout
    specs = {spec.name: spec for spec in captured.signature.inputs}
    tensors = {name: to_tensor(inputs[name], spec).clone() for name, spec in specs.items()}
    count = len(next(iter(tensors.values())))
    tensordict = layout.tensordict(tensors, count)
    starts = tensors[IS_INIT.name] if IS_INIT.name in tensors else torch.ones(count, dtype=torch.bool)
    tensordict.set(IS_INIT.name, starts.reshape(-1, *(layout.is_init_shape if layout.is_init else (1,))))
    with torch.no_grad(), set_composite_lp_aggregate(False), set_exploration_type(MODES[mode]):
        result = policy(tensordict)
    keys = layout.outputs | {f"next_{name}": written for name, (_, written) in layout.states.items()}
    return {name: to_array(result.get(key)) for name, key in keys.items() if result.get(key, None) is not None}
