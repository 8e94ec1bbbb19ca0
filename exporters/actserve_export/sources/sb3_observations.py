"""Observations as an environment gives them -> as a policy of Stable-Baselines3 takes them.

That is, in the order of the wrappers: `VecNormalize`, images from (H, W, C) to (C, H, W), and `VecFrameStack`. A
`VecNormalize` around a `VecFrameStack` has statistics of stacked observations, and is applied after it.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, get_args

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import Bounded, Composite

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Array, Arrays, DType
from actserve_export.sources.keys import RESERVED

_OBSERVATION = "observation"
# Names that an input of the policy cannot have: those of requests, and of what the policy itself reads and writes.
_TAKEN = {*RESERVED, "action", "action_value", "action_masks", "logits", "hidden", "cell", "next"}
_FAR = 1e6  # a bound beyond this counts as no bound


class Observations(nn.Module):
    """`keys` are the names of the inputs, by the key of the observation space."""

    def __init__(
        self, space: spaces.Space[Any], statistics: VecNormalize | None, channels_last: bool, frame_stack: int
    ) -> None:
        super().__init__()
        self.by_name = isinstance(space, spaces.Dict)
        self.spaces: dict[str, Any] = dict(space.spaces) if isinstance(space, spaces.Dict) else {_OBSERVATION: space}
        self.keys = _names(list(self.spaces))
        self.channels_last_keys = [
            name for name, space in self.spaces.items() if channels_last and is_image_space(space)
        ]
        self.count = frame_stack
        self.axes = {name: 0 if is_image_space(space) else -1 for name, space in self.spaces.items()}
        if frame_stack > 1:
            self._refuse_unstacked()
        # Functions, because a VecNormalize that was read from a file cannot be copied, and modules are.
        self.normalize_obs = None if statistics is None else (lambda given: statistics.normalize_obs(given))
        self.normalized: list[str] = []
        self.normalizes_stacks = False
        if statistics is None or not statistics.norm_obs:
            return
        self.normalized = list(statistics.norm_obs_keys or self.spaces)
        self.limit = float(statistics.clip_obs)
        for index, name in enumerate(self.normalized):
            found = statistics.obs_rms[name] if self.by_name else statistics.obs_rms
            # As VecNormalize computes: in float64, and only then as float32.
            self.register_buffer(f"mean_{index}", torch.from_numpy(found.mean))
            self.register_buffer(f"std_{index}", torch.from_numpy(np.sqrt(found.var + statistics.epsilon)))
        self.normalizes_stacks = frame_stack > 1 and all(
            self.get_buffer(f"mean_{index}").shape == self.spaces[name].shape
            for index, name in enumerate(self.normalized)
        )

    @property
    def frames(self) -> dict[str, str]:
        """The names of the state that holds the last observations, by key; empty without a stack."""
        if self.count == 1:
            return {}
        return {name: f"{key}_frames" if self.by_name else "frames" for name, key in self.keys.items()}

    def forward(self, given: dict[str, Tensor], frames: dict[str, Tensor], begins: Tensor | None) -> Any:
        """Observations, (B, *shape) each, and the stacks of the step before -> (the policy's observation, new stacks).

        `begins`, (B,) bool: a stack of zeros is before the first observation of an episode.
        """
        if not self.normalizes_stacks:
            given = self._normalize(given)
        given = {name: x.permute(0, 3, 1, 2) if name in self.channels_last_keys else x for name, x in given.items()}
        stacks = {}
        for name, before in frames.items():
            axis = self.axes[name] % (before.ndim - 1) + 1
            thick = given[name].shape[axis]
            assert begins is not None
            fresh = begins.reshape(-1, *[1] * (before.ndim - 1))
            kept = before.narrow(axis, thick, before.shape[axis] - thick)
            kept = torch.where(fresh, torch.zeros_like(kept), kept)
            given[name] = stacks[name] = torch.cat([kept, given[name]], axis)
        if self.normalizes_stacks:
            given = self._normalize(given)
        return (given if self.by_name else given[_OBSERVATION]), stacks

    def _normalize(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        given = dict(given)
        for index, name in enumerate(self.normalized):
            scaled = (given[name].double() - self.get_buffer(f"mean_{index}")) / self.get_buffer(f"std_{index}")
            given[name] = scaled.clamp(-self.limit, self.limit).float()
        return given

    def prepare(self, inputs: Arrays, begins: Array | None) -> Any:
        """The same with the library's own code, on numpy arrays by input."""
        given: Any = {name: inputs[key] for name, key in self.keys.items()}
        if self.normalize_obs is not None and not self.normalizes_stacks:
            given = self._by_library(given)
        if begins is not None:
            given = {
                name: self._stacked(name, array, inputs[self.frames[name]], begins) for name, array in given.items()
            }
        if self.normalizes_stacks:
            given = self._by_library(given)
        given |= {name: np.moveaxis(given[name], -1, 1) for name in self.channels_last_keys}
        return given if self.by_name else given[_OBSERVATION]

    def _by_library(self, given: Arrays) -> Arrays:
        assert self.normalize_obs is not None
        if self.by_name:
            found: Arrays = self.normalize_obs(given)
            return found
        return {_OBSERVATION: self.normalize_obs(given[_OBSERVATION])}

    def _stacked(self, name: str, array: Array, before: Array, begins: Array) -> Array:
        """One step of `VecFrameStack` for each item."""
        rows = []
        last = name in self.channels_last_keys or self.axes[name] == -1
        for item in range(len(array)):
            one = array[item : item + 1]
            low, high = (-np.inf, np.inf) if one.dtype.kind == "f" else (0, 255)
            stack = StackedObservations(
                1, self.count, spaces.Box(low, high, one.shape[1:], one.dtype), "last" if last else "first"
            )
            if begins[item]:
                rows.append(stack.reset(one).copy())
                continue
            old = before[item : item + 1]
            stack.stacked_obs = np.moveaxis(old, 1, -1) if name in self.channels_last_keys else old
            rows.append(stack.update(one, np.array([False]), [{}])[0].copy())
        return np.concatenate(rows)

    def sample(self, count: int) -> TensorDict:
        """Random observations by input, (count, ...) each; the same every time."""
        drawn = {key: torch.from_numpy(self._sample(name, count)) for name, key in self.keys.items()}
        return TensorDict(drawn, batch_size=[count])

    def stacks(self) -> dict[str, Tensor]:
        """The state before an episode, by name: zeros, of the shape and dtype of the stacked observations."""
        return {
            self.frames[name]: torch.zeros(space.shape, dtype=getattr(torch, _dtype(space)))
            for name, space in self.spaces.items()
            if self.count > 1
        }

    def spec(self) -> Composite:
        """The bounds of numbers that the policy encodes as one-hot vectors."""
        found = {self.keys[name]: _index_bounds(space) for name, space in self.spaces.items()}
        return Composite(
            {name: Bounded(*each, shape=each[0].shape, dtype=torch.int64) for name, each in found.items() if each}
        )

    def _sample(self, name: str, count: int) -> Array:
        space = self.spaces[name]
        if name in self.normalized:
            index = self.normalized.index(name)
            mean, std = (self.get_buffer(f"{what}_{index}").numpy() for what in ("mean", "std"))
            values = mean + std * np.random.default_rng(0).standard_normal((count, *mean.shape))
            values = self._unstacked(name, values) if self.normalizes_stacks else values
        else:
            bounded = _bounded(space)
            bounded.seed(0)
            values = np.stack([bounded.sample() for _ in range(count)])
            if (limits := _index_bounds(space)) is not None:
                values = values.clip(*(limit.numpy() for limit in limits))
            if is_image_space(space):  # of different brightness: plain noise always has the same mean
                values = values * np.random.default_rng(0).random((count, 1, 1, 1))
            values = self._unstacked(name, values)
            values = np.moveaxis(values, 1, -1) if name in self.channels_last_keys else values
        return np.ascontiguousarray(values.astype(_dtype(space)))

    def _unstacked(self, name: str, values: Array) -> Array:
        """The newest observation of stacks."""
        if self.count == 1:
            return values
        return np.split(values, self.count, self.axes[name] % (values.ndim - 1) + 1)[-1]

    def _refuse_unstacked(self) -> None:
        for name, space in self.spaces.items():
            if not isinstance(space, spaces.Box) or not space.shape or space.shape[self.axes[name]] % self.count:
                raise CaptureFailed(
                    f"the observation space {space} holds no {self.count} stacked observations; give the n_stack of "
                    "VecFrameStack as frame_stack"
                )


def _names(keys: list[str]) -> dict[str, str]:
    """A name for each key, with underscores where the name has another meaning."""
    found: dict[str, str] = {}
    for key in keys:
        name = key
        while name in _TAKEN or name in found.values() or (name != key and name in keys):
            name += "_"
        found[key] = name
    return found


def _bounded(space: Any) -> Any:
    """A copy of a space without huge bounds, so that sampling it gives values of ordinary size."""
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        return deepcopy(space)
    low, high = np.where(space.low < -_FAR, -np.inf, space.low), np.where(space.high > _FAR, np.inf, space.high)
    return spaces.Box(low.astype(space.dtype), high.astype(space.dtype), dtype=space.dtype)


def _index_bounds(space: Any) -> tuple[Tensor, Tensor] | None:
    """The lowest and highest values of a discrete space that the policy takes, (*shape) each; None for others.

    Stable-Baselines3 encodes a value as a one-hot vector of n, whatever the `start` of the space is.
    """
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return None
    count = np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec, np.int64)
    start = np.asarray(space.start, np.int64)
    low, high = np.maximum(start, 0), count - 1 + np.minimum(start, 0)
    if (low > high).any():
        raise CaptureFailed(
            f"the observation space {space} starts at {space.start}, and Stable-Baselines3 takes values below {count} "
            "only; train with a space that starts at 0"
        )
    return torch.as_tensor(low), torch.as_tensor(high)


def _dtype(space: Any) -> str:
    """The dtype that a client sends."""
    found = np.dtype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return "bool"
    if found.name in get_args(DType):
        return str(found.name)
    return "float32" if found.kind == "f" else "int32"
