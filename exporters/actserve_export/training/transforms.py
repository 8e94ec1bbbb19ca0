"""A transform that TorchRL has only with torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchrl.envs.transforms import ObservationTransform


class NearestResize(ObservationTransform):
    """(..., C, H, W) -> (..., C, height, width) by nearest neighbour.

    Equal to torchrl's ``Resize(height, width, interpolation="nearest")``, which calls the same torch function through
    torchvision: row i of the result is row floor(i * H / height).
    """

    def __init__(self, height: int, width: int, in_keys: Sequence[str] = ("pixels",)) -> None:
        super().__init__(in_keys=list(in_keys), out_keys=list(in_keys))
        self.size = (height, width)

    def _apply_transform(self, obs: Tensor) -> Tensor:
        leading = obs.shape[:-3]
        if len(leading) != 1:
            obs = obs.reshape(-1, *obs.shape[-3:])
        resized = torch.nn.functional.interpolate(obs, self.size, mode="nearest")
        return resized if len(leading) == 1 else resized.reshape(*leading, *resized.shape[-3:])

    def transform_observation_spec(self, observation_spec: Any) -> Any:
        """The spec with the image entries resized."""
        for key in self.in_keys:
            spec = observation_spec[key]
            spec.space.low = self._apply_transform(spec.space.low)
            spec.space.high = self._apply_transform(spec.space.high)
            spec.shape = spec.space.low.shape
        return observation_spec

    def _reset(self, tensordict: Any, tensordict_reset: Any) -> Any:
        return self._call(tensordict_reset)
