"""Transforms that remember the episode, as steps whose memory is state of the program.

    StepCount      is_init (B,), step_count (B, 1) int64 -> the new count
    EpisodeStart   is_init (B,)
    RewardSoFar    is_init (B,), target_return or episode_reward (B, 1) -> the new one; it reads the last reward
    MaxOfFrames    is_init (B,), pool (B, T - 1, ...) per key -> the new last observations
    Primed         is_init (B,)

`examples` are inputs that a user's example may lack.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs.transforms import RewardSum, TargetReturn

from actserve_export.capture.step_io import StepIO
from actserve_export.capture.steps import TransformStep, keys_of
from actserve_export.sources.keys import Key, key_name, next_key


class StepCount(TransformStep):
    """`StepCounter`: how many steps the episode has had."""

    remembers = True

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.in_keys, self.out_keys = [], keys_of(original, "step_count_keys") or [original.step_count_key]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for key in self.out_keys:
            before = self.io.state(key_name(key), (1,), torch.int64)
            count = torch.where(self.io.is_init().unsqueeze(-1), torch.zeros_like(before), before + 1)
            self.io.set_next_state(key_name(key), count)
            tensordict.set(key, count)
        return tensordict


class EpisodeStart(TransformStep):
    """`InitTracker`: whether an episode begins, (B, 1) bool."""

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.in_keys, self.out_keys = [], keys_of(original, "init_keys") or [original.init_key]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for key in self.out_keys:
            tensordict.set(key, self.io.is_init().unsqueeze(-1))
        return tensordict


class RewardSoFar(TransformStep):
    """`TargetReturn`: a target less the episode's rewards. `RewardSum`: their sum."""

    remembers = True

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.start = float(original.target_return) if isinstance(original, TargetReturn) else 0.0
        self.sign = 1 if isinstance(original, RewardSum) else -1
        self.constant = getattr(original, "mode", None) == "constant"
        self.in_keys = self.in_keys or ["reward"]
        self.out_keys = self.out_keys or ["target_return"]

    def keep(self, read: set[Key]) -> None:
        super().keep(read)
        self.rewards = self.in_keys
        self.in_keys = [] if self.constant else self.in_keys

    @property
    def examples(self) -> dict[Key, Tensor]:
        return {key: torch.zeros(1) for key in self.in_keys}

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for out_key, reward_key in zip(self.out_keys, self.rewards, strict=True):
            if self.constant:
                tensordict.set(out_key, torch.full((self.io.batch, 1), self.start))
                continue
            reward = tensordict.get(reward_key)
            name = key_name(out_key)
            before = self.io.state(name, tuple(int(extent) for extent in reward.shape[1:]), reward.dtype, self.start)
            starts = self.io.is_init().reshape(-1, *[1] * (reward.ndim - 1))
            after = torch.where(starts, torch.full_like(before, self.start), before + self.sign * reward)
            self.io.set_next_state(name, after)
            tensordict.set(out_key, after)
        return tensordict


class MaxOfFrames(TransformStep):
    """`TimeMaxPool`: the largest values of the last T observations; before an episode they are 0."""

    remembers = True

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.earlier = original.buffer_size - 1

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for in_key, out_key in zip(self.in_keys, self.out_keys, strict=True):
            latest = tensordict.get(in_key).unsqueeze(1)  # (B, 1, ...)
            name = "pool" if len(self.in_keys) == 1 else f"{key_name(in_key)}_pool"
            frames = latest
            if self.earlier:
                shape = tuple(int(extent) for extent in latest.shape[2:])
                before = self.io.state(name, (self.earlier, *shape), latest.dtype)
                starts = self.io.is_init().reshape(-1, *[1] * (latest.ndim - 1))
                frames = torch.cat([latest, torch.where(starts, torch.zeros_like(before), before)], 1)
                self.io.set_next_state(name, frames[:, :-1].contiguous())
            tensordict.set(out_key, frames.amax(1))
        return tensordict


class Primed(TransformStep):
    """`TensorDictPrimer`: values that an episode begins with.

    A value that the policy itself changes is state, even the action. One that the example has, or that is drawn at
    random, is an observation. Any other is a constant.
    """

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.specs = dict(original.primers.items(True, True))
        self.defaults = original.default_value
        self.random = bool(original.random) or original.single_default_value
        self.in_keys, self.out_keys = [], list(self.specs)
        self.examples: dict[Key, Tensor] = {}
        self.carried: list[Key] = []  # state

    def choose(self, given: set[Key], carried: set[Key]) -> None:
        """Sort the values that are read. `given`: keys of the example; `carried`: keys that the policy writes."""
        changed = [key for key in self.out_keys if key in carried or next_key(key) in carried]
        drawn = [key for key in self.out_keys if self.random or callable(self.defaults[key])]
        self.examples = {key: self._value(key) for key in (*changed, *drawn)}
        self.carried = [key for key in changed if key not in drawn]
        fixed = [key for key in self.out_keys if key not in given and key not in self.examples]
        self.in_keys, self.out_keys = self.carried, [*self.carried, *fixed]

    def _value(self, key: Key) -> Tensor:
        spec = self.specs[key]
        default = 0.0 if self.random else self.defaults[key]
        value: Tensor = default() if callable(default) else torch.full(spec.shape, float(default), dtype=spec.dtype)
        return value

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for key in self.out_keys:
            value = self._value(key).expand(self.io.batch, *self.specs[key].shape)
            if key in self.carried:
                starts = self.io.is_init().reshape(-1, *[1] * (value.ndim - 1))
                value = torch.where(starts, value, tensordict.get(key))
            tensordict.set(key, value)
        return tensordict
