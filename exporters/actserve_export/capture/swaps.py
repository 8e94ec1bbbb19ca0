"""TorchRL modules that hide state or flip one coin for a whole batch -> modules that do one step, item by item, which
are in `actserve_export.capture.steps`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torch.nn.parameter import UninitializedBuffer
from torchrl.envs.transforms import (
    CatFrames,
    Compose,
    EndOfLifeTransform,
    FrameSkipTransform,
    InitTracker,
    NoopResetEnv,
    ObservationNorm,
    RewardClipping,
    RewardScaling,
    RewardSum,
    StepCounter,
    TensorDictPrimer,
    TimeMaxPool,
    VecNorm,
    VecNormV2,
)
from torchrl.modules import AdditiveGaussianModule, EGreedyModule, GRUModule, LSTMModule, OrnsteinUhlenbeckProcessModule

from actserve.core.errors import CaptureFailed
from actserve_export.capture.ports import Ports
from actserve_export.capture.steps import (
    Affine,
    EpsilonGreedy,
    FrameStack,
    FrozenNorm,
    GaussianNoise,
    Nothing,
    OrnsteinUhlenbeck,
    RecurrentStep,
)


def swap(policy: nn.Module, ports: Ports) -> nn.Module:
    """A copy of `policy` with every such module replaced. Raises `CaptureFailed` for what has no replacement."""
    uncopied = {  # an empty frame buffer cannot be copied, and need not be
        id(module): module
        for module in policy.modules()
        if any(isinstance(buffer, UninitializedBuffer) for buffer in module._buffers.values())
    }
    return _swap(copy.deepcopy(policy, uncopied), ports)


def _swap(module: nn.Module, ports: Ports) -> nn.Module:
    for kind, make in _SWAPS.items():
        if isinstance(module, kind):
            return make(module, ports)
    for name, child in module.named_children():
        replacement = _swap(child, ports)
        if replacement is not child:
            module._modules[name] = replacement
    return module


def _flatten_compose(original: Compose, ports: Ports) -> nn.Module:
    """A `Compose` runs its transforms in turn; so does this, whatever they were replaced with."""
    steps = [_swap(transform, ports) for transform in original.transforms]
    return _SwappedChain(steps)


class _SwappedChain(TensorDictModuleBase):
    def __init__(self, steps: list[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.in_keys, self.out_keys = reads_and_writes(steps)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for step in self.steps:
            tensordict = step(tensordict)
        return tensordict


def reads_and_writes(steps: Any) -> tuple[list[Any], list[Any]]:
    """(keys read before any of `steps` wrote them, keys written), each once and in order."""
    reads: list[Any] = []
    writes: list[Any] = []
    for step in steps:
        reads += [key for key in step.in_keys if key not in writes and key not in reads]
        writes += [key for key in step.out_keys if key not in writes]
    return reads, writes


def _refuse(original: Any, _: Ports) -> nn.Module:
    raise CaptureFailed(
        f"{type(original).__name__} keeps state that cannot be made an input of the program; leave it out of the "
        "policy that is exported, or do its work in the observation"
    )


_SWAPS: dict[type, Callable[[Any, Ports], nn.Module]] = {
    LSTMModule: RecurrentStep,
    GRUModule: RecurrentStep,
    CatFrames: FrameStack,
    ObservationNorm: Affine,
    EGreedyModule: EpsilonGreedy,
    AdditiveGaussianModule: GaussianNoise,
    OrnsteinUhlenbeckProcessModule: OrnsteinUhlenbeck,
    VecNorm: FrozenNorm,
    VecNormV2: FrozenNorm,
    **dict.fromkeys((EndOfLifeTransform, FrameSkipTransform, NoopResetEnv, TimeMaxPool), _refuse),
    StepCounter: Nothing,
    InitTracker: Nothing,
    RewardSum: Nothing,
    RewardScaling: Nothing,
    RewardClipping: Nothing,
    TensorDictPrimer: Nothing,
    Compose: _flatten_compose,
}
