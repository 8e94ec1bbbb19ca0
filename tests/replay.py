"""An environment of TorchRL that replays random observations and rewards, and notes what a policy could see."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase


@dataclass(frozen=True)
class Seen:
    """The observation of one step, with the reward of the step before."""

    observation: Mapping[str, Tensor]
    reward: Tensor  # of the step before, (1,); 0 at the start of an episode
    is_init: bool


@dataclass
class Recording:
    steps: list[Seen] = field(default_factory=list)


class ReplayEnv(EnvBase):
    """`observations` by key. Episodes end after the steps `ends`; `recording` has all that it gave."""

    def __init__(
        self, observations: Mapping[str, TensorSpec], action: TensorSpec, seed: int = 0, ends: Collection[int] = ()
    ) -> None:
        super().__init__(device=None, batch_size=[])
        self.observation_spec = Composite({key: spec.clone() for key, spec in observations.items()})
        self.action_spec = action
        self.reward_spec = Unbounded((1,))
        self.ends = ends
        self.recording = Recording()
        self.generator = torch.Generator().manual_seed(seed)

    def _observation(self, reward: Tensor, is_init: bool) -> TensorDict:
        drawn = {key: self._draw(spec) for key, spec in self.observation_spec.items()}
        self.recording.steps.append(Seen({key: value.clone() for key, value in drawn.items()}, reward, is_init))
        return TensorDict(drawn)

    def _draw(self, spec: Any) -> Tensor:
        if spec.dtype.is_floating_point:
            return torch.randn(spec.shape, generator=self.generator, dtype=torch.float64).to(spec.dtype)
        return torch.randint(0, int(spec.space.high.max()) + 1, spec.shape, generator=self.generator).to(spec.dtype)

    def _reset(self, _: TensorDictBase | None = None) -> TensorDict:
        result = self._observation(torch.zeros(1), is_init=True)
        return result.update({"done": torch.zeros(1, dtype=torch.bool), "terminated": torch.zeros(1, dtype=torch.bool)})

    def _step(self, _: TensorDictBase) -> TensorDict:
        ends = len(self.recording.steps) in self.ends
        reward = torch.randn(1, generator=self.generator)
        result = self._observation(reward, is_init=False)
        if ends:  # no policy acts on the last observation of an episode
            self.recording.steps.pop()
        done = torch.tensor([ends])
        return result.update({"reward": reward.clone(), "done": done, "terminated": done.clone()})

    def _set_seed(self, seed: int | None) -> None:
        pass
