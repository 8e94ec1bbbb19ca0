"""Replacements for modules that work on sequences: chunks of actions, and histories.

ChunkedActions       is_init (B,), counter (B, 1) int32, the chunk (B, T, ...) per action -> the new ones
DecisionTransformer  nothing: its histories are observations, or state of the transforms in front of it
Diffusion            noise (B, steps, action) normal
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.overrides import _pop_mode_temporarily
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import DecisionTransformerInferenceWrapper, MultiStepActorWrapper

from actserve.core.errors import CaptureFailed
from actserve_export.capture.step_io import StepIO
from actserve_export.capture.steps import StepModule
from actserve_export.sources.keys import key_name


class ChunkedActions(StepModule):
    """`MultiStepActorWrapper`: the actor plans a chunk of actions, and the next steps take them from it.

    The actor runs at every step, and its plan is kept where a new one is due.
    """

    def __init__(self, original: MultiStepActorWrapper, io: StepIO, actor: nn.Module) -> None:
        super().__init__(original, io)
        if any(isinstance(module, StepModule) and module.remembers for module in actor.modules()):
            raise CaptureFailed(
                "MultiStepActorWrapper around an actor with state cannot be exported: the actor's state would move on "
                "at every step, and in TorchRL only where it plans; put frame stacks in front of the wrapper"
            )
        self.actor: Any = actor
        self.length, self.keep_dim = original.n_steps, original.keep_dim
        self.interval = original.replan_interval or original.n_steps  # None: a chunk is repeated for ever
        self.chunks = [
            (action, original._chunk_keys_map[action], key_name(original._actor_keys_map[action]))
            for action in original.action_keys
        ]
        self.counter = key_name(original.counter_key)
        self.state_keys = [key for key in original.out_keys if key not in original.action_keys]  # no results
        self.in_keys, self.out_keys = list(actor.in_keys), list(original.action_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        planned = self.actor(tensordict.copy())
        before = self.io.state(self.counter, (1,), torch.int32)
        due = self.io.is_init().unsqueeze(-1)
        if self.interval is not None:
            due = due | (before >= self.interval)
        index = torch.where(due, torch.zeros_like(before), before)
        self.io.set_next_state(self.counter, index + 1)
        for action_key, chunk_key, name in self.chunks:
            chunk = planned.get(chunk_key)  # (B, T, ...)
            if self.length is not None and chunk.shape[1] != self.length:
                raise CaptureFailed(f"{key_name(chunk_key)}: expected {self.length} actions; got {chunk.shape[1]}")
            kept = self.io.state(name, tuple(int(extent) for extent in chunk.shape[1:]), chunk.dtype)
            wide = [1] * (chunk.ndim - 2)
            chunk = torch.where(due.reshape(-1, 1, *wide), chunk, kept)
            self.io.set_next_state(name, chunk)
            at = index.long().remainder(chunk.shape[1]).reshape(-1, 1, *wide).expand(-1, 1, *chunk.shape[2:])
            action = chunk.gather(1, at)
            tensordict.set(action_key, action if self.keep_dim else action.squeeze(1))
        return tensordict


class DecisionTransformer(StepModule):
    """`DecisionTransformerInferenceWrapper`: histories -> the action for their last entry."""

    def __init__(self, original: DecisionTransformerInferenceWrapper, io: StepIO) -> None:
        super().__init__(original, io)
        original.check_keys()  # at its first call it would note that it did
        self.wrapper: Any = original
        self.out_keys = list(original.td_module.out_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        result = self.wrapper(tensordict)
        for key in self.out_keys:
            tensordict.set(key, result.get(key))
        return tensordict


class Diffusion(nn.Module):
    """The denoising chain of `DiffusionActor`, observation (B, n) -> action (B, m); one noise input for all steps.

    In a program it is a loop: a hundred copies of a network take minutes to convert.
    """

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__()
        self.network: Any = original.score_network
        self.count, self.size = original.num_steps, original.action_dim
        betas, alphas, products = (values.flip(0) for values in original._schedule(torch.zeros(())))
        steps = torch.arange(self.count - 1, -1, -1.0)
        spread = betas.sqrt() * (steps > 0)  # the last step adds no noise
        scales = [1 / alphas.sqrt(), betas / (1 - products).sqrt(), spread, steps]
        self.register_buffer("scales", torch.stack(scales, -1), persistent=False)  # (steps, 4)
        self.__dict__["io"] = io

    def forward(self, observation: Tensor) -> Tensor:
        scales: Any = self.scales
        if exploration_type() == ExplorationType.DETERMINISTIC:
            noise = observation.new_zeros(self.count, observation.shape[0], self.size)
        else:
            noise = self.io.noise("normal", (self.count, self.size)).transpose(0, 1)
        noise = noise.contiguous()
        start = noise[0].clone()

        def denoise(x: Tensor, step: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            scale, added = step
            time = scale[3] * torch.ones_like(observation[..., :1])
            predicted = self.network(torch.cat([x, observation, time], -1))
            x = scale[0] * (x - scale[1] * predicted) + scale[2] * added
            return x, scale[3].clone()  # a loop collects something of each step

        steps = (scales, torch.cat([noise[1:], noise[:1]]))
        if torch.compiler.is_exporting():
            with _pop_mode_temporarily():  # NoiseFromInputs, into which the loop's own tracer cannot look
                result: Tensor = scan(denoise, start, steps)[0]
            return result
        for step in zip(*steps, strict=True):
            start, _ = denoise(start, step)
        return start
