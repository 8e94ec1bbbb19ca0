"""BoundLimits and DiscreteLimits: what the limits do to one output of one step.

Everything is written with comparisons and `where`: a comparison with NaN is false in every runtime, and a value within
the limits passes through bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from actserve.core.limits import OutputLimits
from actserve.core.signature import TensorSpec
from actserve_export.capture.limits.flags import every, wide
from actserve_export.sources.limited_actions import starting_action


class Previous(NamedTuple):
    """The action of the step before. `fresh`, of the same shape: there is none, and `action` is the start."""

    action: Tensor  # (B, *shape)
    fresh: Tensor


class Limited(NamedTuple):
    """An output within its limits. `within` and `near` are (B,) bool, None: always.

    `within`: an item was within bounds. `near`: it was near enough to the previous action, or late enough after it.
    """

    action: Tensor  # (B, *shape)
    within: Tensor | None
    near: Tensor | None
    memory: dict[str, Tensor]  # the new state of the limits, by the name of the input that it replaces


class _OutputLimits(nn.Module, ABC):
    """The base of both: the fallback and the previous action."""

    start: Tensor
    fallback: Tensor | None

    def __init__(self, limit: OutputLimits, spec: TensorSpec) -> None:
        super().__init__()
        self.output, self.limit, self.spec = limit.output, limit, spec
        # Whole numbers are compared as int64: ONNX Runtime has few operators for the smaller ones.
        self.dtype = getattr(torch, spec.dtype) if spec.numpy_dtype.kind == "f" else torch.int64
        self._constant("start", starting_action(limit, spec))
        self._constant("fallback", None if limit.fallback == "hold" else limit.fallback)

    def _constant(self, name: str, values: tuple[float, ...] | None) -> None:
        """A buffer (*shape) of `values`, row-major; None for None."""
        array = None if values is None else torch.tensor(np.reshape(values, self.spec.shape), dtype=self.dtype)
        self.register_buffer(name, array)

    def _previous(self, inputs: Mapping[str, Tensor], starts: Tensor | None) -> Previous | None:
        """None if no limit needs it. An element that no step can have left counts as none."""
        if self.limit.previous is None or starts is None:
            return None
        given = inputs[self.limit.previous].to(self.dtype)
        fresh = wide(starts, given) | ~self._is_valid(given)
        return Previous(torch.where(fresh, self.start, given), fresh)

    def _fallback(self, previous: Previous | None) -> Tensor:
        """(*shape) if it is a constant, else (B, *shape)."""
        if self.fallback is not None:
            return self.fallback
        assert previous is not None
        return previous.action

    @abstractmethod
    def _is_valid(self, action: Tensor) -> Tensor:
        """Whether each element is within the limits, (B, *shape) bool."""

    def _memory(self, action: Tensor) -> dict[str, Tensor]:
        """The action as the next step's previous one."""
        return {} if self.limit.previous is None else {self.limit.previous: action.to(getattr(torch, self.spec.dtype))}


class BoundLimits(_OutputLimits):
    """`low`, `high` and `change` of an output, or of each action of a chunk, of which `steps` are taken."""

    low: Tensor
    high: Tensor
    change: Tensor | None

    def __init__(self, limit: OutputLimits, spec: TensorSpec, steps: int | None) -> None:
        super().__init__(limit, spec)
        self.steps = steps
        least, most = spec.limits
        self._constant("low", limit.low or (least,) * spec.elements)
        self._constant("high", limit.high or (most,) * spec.elements)
        self._constant("change", limit.change)

    def forward(
        self, results: Mapping[str, Tensor], finite: Tensor, starts: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> Limited:
        given = results[self.output].to(self.dtype)
        previous = self._previous(inputs, starts)
        fallback = self._fallback(previous)
        if self.steps is not None and self.fallback is None:
            fallback = fallback.unsqueeze(1)  # for every action of the chunk
        wanted = torch.where(wide(finite, given), given, fallback)
        action, within, near = wanted, None, None
        if self.limit.low is not None or self.limit.high is not None:
            action = _clamped(wanted, self.low, self.high)
            within = every(action == wanted)
        if self.change is not None and previous is not None:
            bounded, action = action, self._slowed(action, previous, self.change)
            near = every(action == bounded)
        taken = action if self.steps is None else action[:, self.steps - 1]
        return Limited(action.to(results[self.output].dtype), within, near, self._memory(taken))

    def _slowed(self, wanted: Tensor, previous: Previous, change: Tensor) -> Tensor:
        """`wanted` (B, *shape), at most `change` away from the action before; of a chunk, each entry in turn.

        Without `start`, the first action of an episode may be any.
        """
        entries = [wanted] if self.steps is None else list(wanted.unbind(1))
        actions: list[Tensor] = []
        for entry in entries:
            before = actions[-1] if actions else previous.action
            slowed = _clamped(entry, before - change, before + change)
            if not actions and self.limit.start is None:
                slowed = torch.where(previous.fresh, entry, slowed)
            actions.append(slowed)
        return actions[0] if self.steps is None else torch.stack(actions, 1)

    def _is_valid(self, action: Tensor) -> Tensor:
        return (action >= self.low) & (action <= self.high)


class DiscreteLimits(_OutputLimits):
    """`allowed` and `dwell` of an output of whole numbers."""

    allowed: Tensor

    def __init__(self, limit: OutputLimits, spec: TensorSpec) -> None:
        super().__init__(limit, spec)
        self.register_buffer("allowed", torch.tensor(limit.allowed))

    def forward(
        self, results: Mapping[str, Tensor], finite: Tensor, starts: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> Limited:
        given = results[self.output].long()
        previous = self._previous(inputs, starts)
        fallback = self._fallback(previous)
        best = fallback
        if self.limit.scores is not None:
            best = self.allowed[results[self.limit.scores].index_select(-1, self.allowed).argmax(-1)]
        wanted = torch.where(wide(finite, given), given, fallback)
        allowed = self._is_valid(wanted)
        action, near, age = torch.where(allowed, wanted, best), None, dict[str, Tensor]()
        if self.limit.age is not None and previous is not None:
            chosen = action
            action, age[self.limit.age] = self._dwelling(chosen, previous, inputs[self.limit.age])
            near = every(action == chosen)
        return Limited(action.to(results[self.output].dtype), every(allowed), near, self._memory(action) | age)

    def _dwelling(self, wanted: Tensor, previous: Previous, age: Tensor) -> tuple[Tensor, Tensor]:
        """(`wanted`, or where the previous action has not stayed for `dwell` steps, that one; the new age)."""
        age = torch.where(previous.fresh | (age < 0), 0, age)  # 0: there is no previous action
        stays = (age > 0) & (age < self.limit.dwell)
        action = torch.where(stays, previous.action, wanted)
        older = torch.where(age < self.limit.dwell, age + 1, self.limit.dwell)
        return action, torch.where((age > 0) & (action == previous.action), older, 1)

    def _is_valid(self, action: Tensor) -> Tensor:
        return (action.unsqueeze(-1) == self.allowed).any(-1)


def _clamped(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(value < low, low, torch.where(value > high, high, value))
