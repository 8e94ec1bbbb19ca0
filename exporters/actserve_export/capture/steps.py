"""Replacements for the TorchRL modules that hide state or draw random numbers. Each does one step, item by item.

A replacement takes a tensordict of (B, ...) tensors and writes its result there, under the same keys. State and noise
go through `StepIO`, and so become inputs and outputs of the program:

    RecurrentStep         is_init (B,), state (B, layers, hidden) per key, float32 -> the new state
    FrameStack            is_init (B,), frames (B, ..., N * C, ...) -> the new frames
    GaussianNoise         noise (B, *action) normal, sigma (B,)
    OrnsteinUhlenbeck     is_init (B,), ou_noise (B, *action), ou_steps (B,) int64, noise (B, *action) normal,
                          epsilon (B,) -> the new ou_noise and ou_steps
    FixedVecNorm, LeftOut: nothing

Each does the arithmetic of the module that it replaces. `tests/test_swaps.py` compares the two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Bounded
from torchrl.envs.transforms import VecNorm
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import AdditiveGaussianModule, LSTMModule, OrnsteinUhlenbeckProcessModule

from actserve.core.errors import CaptureFailed
from actserve_export.capture.step_io import StepIO
from actserve_export.sources.keys import key_name


class StepModule(TensorDictModuleBase):
    """A replacement with the keys of the original."""

    remembers = False  # whether it has state

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__()
        self.in_keys = list(original.in_keys)
        self.out_keys = list(original.out_keys)
        self.__dict__["io"] = io

    @property
    def exploring(self) -> bool:
        return exploration_type() in (ExplorationType.RANDOM, None)


class TransformStep(StepModule):
    """A replacement of a transform: it prepares observations, and can leave out what the policy does not read."""

    def __init__(self, original: Any, io: StepIO) -> None:
        TensorDictModuleBase.__init__(self)
        self.in_keys, self.out_keys = keys_of(original, "in_keys"), keys_of(original, "out_keys")
        self.__dict__["io"] = io

    def keep(self, read: set[Any]) -> None:
        """Drop all out_keys but those in `read`, each with its in_key."""
        if self.in_keys:
            pairs = [(a, b) for a, b in zip(self.in_keys, self.out_keys, strict=True) if b in read]
            self.in_keys, self.out_keys = [a for a, _ in pairs], [b for _, b in pairs]
        else:
            self.out_keys = [key for key in self.out_keys if key in read]


def keys_of(original: Any, name: str) -> list[Any]:
    """The keys of a transform. Some ask its environment for them, which may be gone: then there are none."""
    try:
        return list(getattr(original, name, None) or [])
    except (NotImplementedError, RuntimeError, ValueError):  # what these properties raise without an environment
        return []


class RecurrentStep(StepModule):
    """One step of an `LSTMModule` or `GRUModule`. State is zeroed where `is_init`."""

    remembers = True

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        fused = original.make_cudnn_based()  # torch's own cell, which both runtimes support
        self.cell: Any = fused.lstm if isinstance(original, LSTMModule) else fused.gru
        if self.cell.bidirectional:
            raise CaptureFailed(
                f"{type(original).__name__} of {key_name(original.in_keys[0])!r} is bidirectional: it also reads the "
                "steps to come, so it cannot act one step at a time; train it with bidirectional=False"
            )
        self.state_keys = self.in_keys[1 : 3 if isinstance(original, LSTMModule) else 2]
        self.in_keys, self.out_keys = self.in_keys[:1], self.out_keys[:1]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        features = tensordict.get(self.in_keys[0])
        # The hidden state of an LSTM is as wide as its projection, its cell state is not.
        widths = (self.cell.proj_size or self.cell.hidden_size, self.cell.hidden_size)
        starts = self.io.is_init().reshape(-1, 1, 1)
        states = []
        for key, width in zip(self.state_keys, widths, strict=False):
            shape = (self.cell.num_layers, width)
            state = self.io.state(key_name(key), shape, features.dtype)  # (B, layers, width)
            states.append(torch.where(starts, torch.zeros_like(state), state).transpose(0, 1).contiguous())
        steps = features.reshape(-1, 1, features.shape[-1])
        if len(states) == 2:
            result, new = self.cell(steps, (states[0], states[1]))
        else:
            result, new_state = self.cell(steps, states[0])
            new = (new_state,)
        tensordict.set(self.out_keys[0], result.reshape(*features.shape[:-1], result.shape[-1]))
        for key, tensor in zip(self.state_keys, new, strict=True):
            # Contiguous, because the result is an input of the next step, and a program does not check strides.
            self.io.set_next_state(key_name(key), tensor.transpose(0, 1).contiguous())
        return tensordict


class FrameStack(TransformStep):
    """`CatFrames`: the last N observations along an axis are state. `padding` fills it on `is_init`, as in training."""

    remembers = True

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.count, self.dim = original.N, original.dim
        self.padding, self.fill = original.padding, float(original.padding_value)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        starts = self.io.is_init()
        for in_key, out_key in zip(self.in_keys, self.out_keys, strict=True):
            latest = tensordict.get(in_key)
            name = "frames" if len(self.in_keys) == 1 else f"{key_name(in_key)}_frames"
            thick = latest.shape[self.dim]
            shape = list(latest.shape[1:])
            shape[self.dim] = thick * self.count
            frames = self.io.state(name, tuple(shape), latest.dtype, self.fill)
            moved = torch.cat([frames.narrow(self.dim, thick, thick * (self.count - 1)), latest], self.dim)
            before = latest if self.padding == "same" else torch.full_like(latest, self.fill)
            fresh = torch.cat([before] * (self.count - 1) + [latest], self.dim)
            stacked = torch.where(starts.reshape(-1, *[1] * (latest.ndim - 1)), fresh, moved)
            self.io.set_next_state(name, stacked)
            tensordict.set(out_key, stacked)
        return tensordict

    def transform_observation_spec(self, spec: Any) -> Any:
        return spec


class GaussianNoise(StepModule):
    """`AdditiveGaussianModule`: adds sigma times normal noise to the action, and clamps it to the spec."""

    def __init__(self, original: AdditiveGaussianModule, io: StepIO) -> None:
        super().__init__(original, io)
        self.key = original.action_key
        self.spec: Any = original.spec[original.action_key]
        self.sigma, self.mean, self.std = float(original.sigma), float(original.mean), float(original.std)
        self.safe = original.safe

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(self.key)
        if not self.exploring:
            return tensordict.set(self.key, _clamped(action, self.spec)) if self.safe else tensordict
        sigma = self.io.parameter("sigma", self.sigma, 0.0).reshape(-1, *[1] * (action.ndim - 1))
        noise = self.io.noise("normal", tuple(int(extent) for extent in action.shape[1:]))
        tensordict.set(self.key, _clamped(action + (noise * self.std + self.mean) * sigma, self.spec))
        return tensordict


class OrnsteinUhlenbeck(StepModule):
    """`OrnsteinUhlenbeckProcessModule`: the noise process and its age are state (Uhlenbeck & Ornstein 1930)."""

    remembers = True

    def __init__(self, original: OrnsteinUhlenbeckProcessModule, io: StepIO) -> None:
        super().__init__(original, io)
        self.process: Any = original.ou
        self.key = original.ou.key
        self.spec: Any = original.spec[original.ou.key]
        self.epsilon = float(original.eps)
        self.safe = original.safe

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(self.key)
        if not self.exploring:
            return tensordict.set(self.key, _clamped(action, self.spec)) if self.safe else tensordict
        process = self.process
        inner = tuple(int(extent) for extent in action.shape[1:])
        wide = [1] * len(inner)
        starts = self.io.is_init()
        before = self.io.state("ou_noise", inner, action.dtype)
        age = self.io.state("ou_steps", (), torch.int64)
        before = torch.where(starts.reshape(-1, *wide), torch.zeros_like(before), before) + process.x0
        age = torch.where(starts, torch.zeros_like(age), age)
        sigma = (process.m * age + process.c).clamp_min(process.sigma_min).reshape(-1, *wide)
        drift = process.theta * (process.mu - before) * process.dt
        after = before + drift + sigma * math.sqrt(process.dt) * self.io.noise("normal", inner)
        self.io.set_next_state("ou_noise", after - process.x0)
        self.io.set_next_state("ou_steps", age + 1)
        epsilon = self.io.parameter("epsilon", self.epsilon, 0.0).reshape(-1, *wide)
        moved = action + epsilon * after
        tensordict.set(self.key, _clamped(moved, self.spec) if self.safe else moved)
        return tensordict


class LeftOut(TransformStep):
    """A transform that only training needs, or that removes keys."""

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.in_keys, self.out_keys = [], []

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict


class FixedVecNorm(TransformStep):
    """A frozen `VecNorm`: (x - loc) / scale for each key, with constants."""

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.name, self.frozen = type(original).__name__, original.frozen
        self.stateful = getattr(original, "stateful", True)
        if not self.stateful:
            pairs = zip(original._in_keys, original.out_keys, strict=False)
            self.in_keys, self.out_keys = map(list, zip(*pairs, strict=True))
        elif self.frozen:
            loc, scale = self._statistics(original)
            for index, key in enumerate(self.in_keys):
                if key in loc.keys(True) and bool(loc.get(key).isfinite().all()):
                    self.register_buffer(f"loc_{index}", loc.get(key).detach().clone())
                    self.register_buffer(f"scale_{index}", scale.get(key).detach().clone())
        self.index = {key: index for index, key in enumerate(self.in_keys)}

    def _statistics(self, original: Any) -> Any:
        """(mean, standard deviation), tensordicts by key."""
        if original._td is None if isinstance(original, VecNorm) else original._loc is None:
            return TensorDict(), TensorDict()
        return original._get_loc_scale()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for in_key, out_key in zip(self.in_keys, self.out_keys, strict=True):
            if not self.stateful:
                raise CaptureFailed(f"{self.name}(stateful=False) cannot be exported: train with stateful=True")
            if not self.frozen:
                raise CaptureFailed(
                    f"{self.name} still gathers statistics: call .freeze() on it before the export, "
                    "so that the exported policy acts as the trained one"
                )
            loc, scale = (getattr(self, f"{name}_{self.index[in_key]}", None) for name in ("loc", "scale"))
            if loc is None or scale is None:
                raise CaptureFailed(f"{self.name} has no statistics of {in_key!r}: run the environment, then freeze it")
            tensordict.set(out_key, (tensordict.get(in_key) - loc) / scale)
        return tensordict


def _clamped(action: Tensor, spec: Any) -> Tensor:
    if not isinstance(spec, Bounded):
        return action
    shape = action.shape[1:]
    return torch.maximum(torch.minimum(action, spec.space.high.expand(shape)), spec.space.low.expand(shape))
