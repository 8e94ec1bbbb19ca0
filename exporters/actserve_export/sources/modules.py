"""Any `torch.nn.Module` -> PolicySource: CleanRL's agents and networks, and other functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, exploration_type

from actserve.core.errors import CaptureFailed
from actserve_export.sources.policy_source import ArrayLike, PolicySource, as_tensors

ACTIONS = ("argmax", "identity")


def from_module(
    module: nn.Module,
    example: ArrayLike | Mapping[str, ArrayLike] | TensorDictBase,
    action: str | Callable[[Any], Tensor],
    *,
    call: Callable[..., Any] | None = None,
    sample: Callable[..., Tensor] | None = None,
) -> PolicySource:
    """A policy that turns the output of `module` into an action.

    `example` is one item without a batch axis: a tensor, which is named "observation", or tensors by name; numpy arrays
    and numbers will do. The module takes them in this order, each (B, *shape).
    `action` says how the output becomes the action. "argmax": the output is one value or logit per action, (B, n); the
    policy returns the best action and the values, as `action_value`. "identity": the output is the action. A function:
    output -> action, (B, ...).
    `call(module, *inputs)` replaces the module's forward. `sample(module, *inputs)` returns random actions, (B, ...);
    with it, the artifact acts deterministically or at random.
    Raises `CaptureFailed` for another `action`.
    """
    if not isinstance(module, nn.Module):
        raise CaptureFailed(
            f"expected an nn.Module; got {module if isinstance(module, type) else type(module).__name__}"
        )
    if not callable(action) and action not in ACTIONS:
        raise CaptureFailed(f"expected an action of {', '.join(ACTIONS)} or a function; got {action!r}")
    items = as_tensors(example if isinstance(example, (Mapping, TensorDictBase)) else {"observation": example})
    out_keys = ["action", "action_value"] if action == "argmax" else ["action"]
    policy = TensorDictModule(_ModulePolicy(module, action, call, sample), in_keys=list(items), out_keys=out_keys)
    return PolicySource(policy, TensorDict(items), weights=module, library="PyTorch")


class _ModulePolicy(nn.Module):
    """inputs -> action, or (action, action_value) for "argmax"."""

    def __init__(
        self, module: nn.Module, action: str | Callable[[Any], Tensor], call: Any, sample: Callable[..., Tensor] | None
    ) -> None:
        super().__init__()
        self.module = module
        self.action, self.call, self.sample = action, call, sample

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        output = self.module(*inputs) if self.call is None else self.call(self.module, *inputs)
        action = self._action(output)
        if self.sample is not None and exploration_type() != ExplorationType.DETERMINISTIC:
            action = self.sample(self.module, *inputs)
        return (action, output) if self.action == "argmax" else action

    def _action(self, output: Any) -> Tensor:
        if callable(self.action):
            return self.action(output)
        if not isinstance(output, Tensor):
            raise CaptureFailed(f"{self.action}: expected a module that gives a tensor; got {type(output).__name__}")
        return torch.argmax(output, -1) if self.action == "argmax" else output
