"""A policy -> a copy whose modules with hidden state or batch-wide randomness are replaced.

The tables are `_SWAPS` and `_TRANSFORMS`; the replacements are in `actserve_export.capture.steps`, those of transforms
in `actserve_export.capture.transforms`. `swap` takes and returns a module, and the replacements ask the given `StepIO`
for their state and noise, (B, ...) each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torchrl.envs import EnvBase
from torchrl.envs.transforms import Compose, ModuleTransform, Transform
from torchrl.modules import (
    AdditiveGaussianModule,
    ConsistentDropoutModule,
    DecisionTransformerInferenceWrapper,
    DreamerV3SeededPolicy,
    EGreedyModule,
    GRUModule,
    LSTMModule,
    MPCPlannerBase,
    MultiStepActorWrapper,
    OrnsteinUhlenbeckProcessModule,
)
from torchrl.modules.models.exploration import gSDEModule
from torchrl.modules.models.multiagent import MultiAgentNetBase
from torchrl.modules.tensordict_module.actors import _DDPMModule

from actserve.core.errors import CaptureFailed
from actserve_export.capture.agents import AgentNetworks
from actserve_export.capture.attention import without_vmap
from actserve_export.capture.exploration import EpsilonGreedy, StateDependentNoise, WithoutDropout
from actserve_export.capture.sequences import ChunkedActions, DecisionTransformer, Diffusion
from actserve_export.capture.step_io import StepIO
from actserve_export.capture.steps import GaussianNoise, LeftOut, OrnsteinUhlenbeck, RecurrentStep
from actserve_export.capture.transforms import TRANSFORMS

Kinds: TypeAlias = dict[type, Callable[[Any, StepIO], nn.Module]]


def swap(policy: nn.Module, io: StepIO, *, transforms_only: bool = False) -> nn.Module:
    """A copy of `policy` with replacements. Raises `CaptureFailed` for a module with state and no replacement."""
    copied = copy_of(policy)
    for module in copied.modules():
        _make_weights_plain(module)
        without_vmap(module)
    return _swap(copied, io, _TRANSFORMS if transforms_only else _SWAPS)


def copy_of(policy: nn.Module) -> nn.Module:
    """A deep copy, of policies too that `copy.deepcopy` refuses."""
    uncopied = {  # an empty frame buffer cannot be copied; its module is replaced anyway
        id(module): module
        for module in policy.modules()
        if any(isinstance(buffer, UninitializedBuffer) for buffer in module._buffers.values())
    }
    computed = {  # a tensor that a hook computes from parameters, such as that of weight_norm, cannot be copied either
        id(value): value.detach().clone()
        for module in policy.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    environments = {  # transforms refer to theirs
        id(value): value
        for module in policy.modules()
        if isinstance(module, Transform)
        for value in (module._container and module._container(), module._parent)
        if isinstance(value, EnvBase)
    }
    return copy.deepcopy(policy, uncopied | computed | environments)


def _make_weights_plain(module: nn.Module) -> None:
    """Replace normalised, pruned and parametrised weights by their values."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            nn.utils.remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            nn.utils.remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
    if parametrize.is_parametrized(module):
        # remove_parametrizations would change the class, which the user's module has, too.
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))


def _swap(module: nn.Module, io: StepIO, kinds: Kinds) -> nn.Module:
    if kinds is not _TRANSFORMS and isinstance(module, TensorDictModule) and isinstance(module.module, gSDEModule):
        return StateDependentNoise(module, io)
    for kind, make in kinds.items():
        if isinstance(module, kind):
            return make(module, io)
    for name, child in module.named_children():
        replacement = _swap(child, io, kinds)
        if replacement is not child:
            module._modules[name] = replacement
    if isinstance(module, ProbabilisticTensorDictSequential) and module.det_part is not None:
        *deterministic, _ = module._module_iter()
        module.__dict__["_det_part"] = TensorDictSequential(*deterministic)  # it runs all but its last module
    return module


def _swap_compose(original: Compose, io: StepIO) -> nn.Module:
    """A `Compose` whose transforms are replaced."""
    return SwappedCompose([_swap(transform, io, _TRANSFORMS) for transform in original.transforms])


class SwappedCompose(TensorDictModuleBase):
    def __init__(self, steps: list[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.in_keys, self.out_keys = reads_and_writes(steps)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for step in self.steps:
            tensordict = step(tensordict)
        return tensordict


def reads_and_writes(steps: Any) -> tuple[list[Any], list[Any]]:
    """(keys read before a step wrote them, keys written), each once, in order.

    A nested key is written where its entries are: ("params", "loc") gives "params", and the other way round.
    """
    reads: list[Any] = []
    writes: list[Any] = []
    for step in steps:
        reads += [key for key in step.in_keys if key not in reads and not any(_overlap(key, each) for each in writes)]
        writes += [key for key in step.out_keys if key not in writes]
    return reads, writes


def _overlap(one: Any, other: Any) -> bool:
    """Whether the keys are the same, or one of them holds the other."""
    parts = list(zip(*((key,) if isinstance(key, str) else key for key in (one, other)), strict=False))
    return all(a == b for a, b in parts)


def _swap_agents(original: MultiAgentNetBase, _: StepIO) -> nn.Module:
    return AgentNetworks(original)


def _refuse_planner(original: Any, _: StepIO) -> nn.Module:
    raise CaptureFailed(
        f"{type(original).__name__} plans by stepping an environment ({type(original.env).__name__}), and a program "
        "has none: train a policy on its actions and export that, or plan in the client"
    )


def _swap_module_transform(original: ModuleTransform, io: StepIO) -> nn.Module:
    return LeftOut(original, io) if original.inverse else _swap(original.module, io, _SWAPS)


_TRANSFORMS: Kinds = {
    ModuleTransform: _swap_module_transform,
    **{kind: make for kind, make in TRANSFORMS.items() if kind is not Transform},
    Compose: _swap_compose,
    Transform: TRANSFORMS[Transform],
}
_SWAPS: Kinds = {
    LSTMModule: RecurrentStep,
    GRUModule: RecurrentStep,
    EGreedyModule: EpsilonGreedy,
    ConsistentDropoutModule: WithoutDropout,
    AdditiveGaussianModule: GaussianNoise,
    OrnsteinUhlenbeckProcessModule: OrnsteinUhlenbeck,
    MultiAgentNetBase: _swap_agents,
    MultiStepActorWrapper: lambda original, io: ChunkedActions(original, io, _swap(original.actor, io, _SWAPS)),
    DecisionTransformerInferenceWrapper: DecisionTransformer,
    DreamerV3SeededPolicy: lambda original, io: _swap(original.module, io, _SWAPS),  # its seed is the request's
    _DDPMModule: Diffusion,
    MPCPlannerBase: _refuse_planner,
    **_TRANSFORMS,
}
