"""LimitedStep: one step of a policy that keeps to its limits. It is traced, and it is the reference."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from actserve.core.limits import LIMITED, OutputLimits, Reason
from actserve.core.signature import IS_INIT, Signature, State, TensorSpec
from actserve_export.capture.limits.flags import all_of, every, wide
from actserve_export.capture.limits.outputs import BoundLimits, DiscreteLimits
from actserve_export.capture.step_program import named_forward
from actserve_export.sources.limited_actions import action_spec, taken_of_chunk


class LimitedStep(nn.Module):
    """`policy` takes the inputs and gives the results of `own`; this module those of `signature`, which has limits."""

    def __init__(self, policy: nn.Module, own: Signature, signature: Signature) -> None:
        super().__init__()
        assert signature.limits is not None
        self.policy = policy
        self._own, self._signature, self._limits = own, signature, signature.limits
        self.outputs = nn.ModuleList(_limits_of(own, limit) for limit in signature.limits.outputs)
        self.state = KeptState(own.state) if any(_is_float(state.spec) for state in own.state) else None
        self.__dict__["forward"] = named_forward(tuple(spec.name for spec in signature.inputs), self.run)

    def run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """All results of `signature`, (B, ...) each. `inputs` are all of its inputs, by name."""
        results = dict(
            zip(
                (spec.name for spec in self._own.results),
                self.policy(*(inputs[spec.name] for spec in self._own.inputs)),
                strict=True,
            )
        )
        finite = self._finite(inputs, results)
        starts = inputs.get(IS_INIT.name)
        kept = {Reason.BOUNDS: list[Tensor](), Reason.CHANGE: list[Tensor](), Reason.NOT_FINITE: [finite]}
        for limits in self.outputs:
            found = limits(results, finite, starts, inputs)
            results[limits.output] = found.action
            results |= {f"next_{name}": tensor for name, tensor in found.memory.items()}
            kept[Reason.BOUNDS] += [] if found.within is None else [found.within]
            kept[Reason.CHANGE] += [] if found.near is None else [found.near]
        if self.state is not None:
            state, healthy = self.state(inputs, results, starts)
            results |= state
            kept[Reason.STATE] = [healthy]
        bits = [torch.where(all_of(flags), 0, int(reason)) for reason, flags in kept.items() if flags]
        results[LIMITED] = reduce(torch.add, bits).to(torch.uint8)
        # Contiguous, because a runtime does not check strides.
        return tuple(results[spec.name].contiguous() for spec in self._signature.results)

    def _finite(self, inputs: Mapping[str, Tensor], results: Mapping[str, Tensor]) -> Tensor:
        """(B,) bool: whether an item's actions can be taken. Scores may be -Inf, as those of masked actions are."""
        specs = {spec.name: spec for spec in (*self._own.inputs, *self._own.outputs)}
        parts = [
            every(results[limit.output].abs() <= specs[limit.output].limits[1])
            for limit in self._limits.outputs
            if _is_float(specs[limit.output])
        ]
        scores = dict.fromkeys(limit.scores for limit in self._limits.outputs if limit.scores)
        parts += [every(results[name] <= specs[name].limits[1]) for name in scores]
        if self._limits.finite_observations:
            floats = [spec for spec in self._own.observations if _is_float(spec)]
            parts += [every(inputs[spec.name].abs() <= spec.limits[1]) for spec in floats]
        if not parts:
            batch = next(iter(results.values())).shape[0]
            return torch.ones(batch, dtype=torch.bool)
        return all_of(parts)


class KeptState(nn.Module):
    """Keeps the state of an item whose new state is not finite: the old one, or if that is not finite, the initial."""

    def __init__(self, states: tuple[State, ...]) -> None:
        super().__init__()
        self._states = states
        for index, state in enumerate(states):
            self.register_buffer(f"initial_{index}", torch.from_numpy(state.initial_value(1)))

    def forward(
        self, inputs: Mapping[str, Tensor], results: Mapping[str, Tensor], starts: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(the new state by the name of its output, (B,) bool: where it is the policy's own)."""
        healthy = self._finite([results[state.output] for state in self._states])
        known = self._finite([inputs[state.spec.name] for state in self._states])
        if starts is not None:
            known = known & ~starts
        kept = {}
        for index, state in enumerate(self._states):
            new, old = results[state.output], inputs[state.spec.name]
            before = torch.where(wide(known, old), old, getattr(self, f"initial_{index}"))
            kept[state.output] = torch.where(wide(healthy, new), new, before)
        return kept, healthy

    def _finite(self, tensors: list[Tensor]) -> Tensor:
        """(B,) bool: whether all of an item's floating-point state is finite."""
        parts = [
            every(tensor.abs() <= state.spec.limits[1])
            for tensor, state in zip(tensors, self._states, strict=True)
            if _is_float(state.spec)
        ]
        return all_of(parts)


def _limits_of(own: Signature, limit: OutputLimits) -> BoundLimits | DiscreteLimits:
    spec = action_spec(own, limit.output)
    if limit.allowed is not None:
        return DiscreteLimits(limit, spec)
    return BoundLimits(limit, spec, taken_of_chunk(own, limit.output))


def _is_float(spec: TensorSpec) -> bool:
    return spec.numpy_dtype.kind == "f"
