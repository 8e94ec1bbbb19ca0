"""StepIO: the inputs and outputs of a program besides observations and actions.

These are state, the reset flag `is_init`, noise and parameters. A module inside the policy asks `StepIO` for each one
that it needs. The first, eager run records the requests, and they become the signature. In every later run, traced or
eager, `StepIO` returns the inputs of the program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from actserve.core.completion import draw_noise
from actserve.core.errors import CaptureFailed
from actserve.core.signature import IS_INIT, Distribution, DType, Noise, Parameter, State, TensorSpec

MOST_DRAWS = 1000  # of one step


class Undrawable(CaptureFailed):
    """The policy draws random numbers that cannot be inputs of a program: it can be exported for deterministic use."""


class StepIO:
    """The policy's modules call it during a run. `begin` starts a run; `next_states` has the new state after it."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}
        self.parameters: dict[str, Parameter] = {}
        self.noises: list[Noise] = []
        self.uses_is_init = False
        self.taken: set[str] = set()  # names of the policy's own inputs
        self.overwritten: set[str] = set()  # inputs that the policy changes in place
        self.deterministic = False  # the mode of the run
        self.next_states: dict[str, Tensor] = {}
        self._inputs: Mapping[str, Tensor] | None = None
        self._batch: Any = 0
        self._drawn = 0
        self._axes: dict[int, int] = {}  # of the draws whose batch may be elsewhere than first

    def clear(self) -> None:
        """Forget all recorded requests."""
        self.states.clear()
        self.parameters.clear()
        self.noises.clear()
        self._axes.clear()
        self.uses_is_init = False

    def begin(self, batch: Any, inputs: Mapping[str, Tensor] | None) -> None:
        """Start a run of `batch` items (an int, or symbolic). `inputs` are the program's; None: record requests."""
        self._batch, self._inputs = batch, inputs
        self._drawn = 0

    @property
    def batch(self) -> Any:
        return self._batch

    def state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, initial: float = 0.0) -> Tensor:
        """The state `name`, (B, *shape)."""
        name = self._free(name)
        if self._inputs is not None:
            return self._inputs[name].bfloat16() if dtype == torch.bfloat16 else self._inputs[name]
        self.states[name] = State(TensorSpec(name, dtype_name(name, dtype), tuple(shape)), f"next_{name}", initial)
        return torch.full((self._batch, *shape), initial, dtype=dtype)

    def set_next_state(self, name: str, tensor: Tensor) -> None:
        """Set `name` for the next step, (B, *shape)."""
        name = self._free(name)
        self.next_states[name] = tensor

    def _free(self, name: str) -> str:
        """`name`, or if the policy has an input of this name, another one."""
        while name in self.taken:
            name += "_"
        return name

    def is_init(self) -> Tensor:
        """(B,) bool: which items are at the first step of an episode."""
        if self._inputs is not None:
            return self._inputs[IS_INIT.name]
        self.uses_is_init = True
        return torch.ones(self._batch, dtype=torch.bool)

    def parameter(self, name: str, default: float, low: float, high: float | None = None) -> Tensor:
        """The parameter `name`, (B,) float32."""
        name = self._free(name)
        if self._inputs is not None:
            return self._inputs[name]
        self.parameters[name] = Parameter(name, default, low, high)
        return torch.full((self._batch,), default)

    def noise(self, distribution: Distribution, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) float32 from the standard `distribution`. The n-th call of a run gets the n-th noise input."""
        index = self._drawn
        self._drawn += 1
        if self._inputs is not None:
            return self._inputs[self.noises[index].spec.name]
        if index >= MOST_DRAWS:  # the same noise each time: a loop that draws until values fit never ends
            raise Undrawable("the policy draws random numbers until they fit, and a program cannot repeat itself")
        name = self._free("noise" if index == 0 else f"noise_{index}")
        noise = Noise(TensorSpec(name, "float32", tuple(shape)), distribution, always=self.deterministic)
        self.noises.append(noise)
        return torch.from_numpy(draw_noise((noise,), seed=0, size=self._batch)[name])

    def noise_along(self, distribution: Distribution, shape: tuple[Any, ...]) -> tuple[Tensor, int]:
        """Noise for a draw of `shape`, as (B, *item), and the axis to move the batch to.

        The batch is the axis with the batch's extent, or else with a multiple of it: (B * agents, ...).
        """
        if self._inputs is not None:
            axis = self._axes.get(self._drawn, 0)
            noise = self.noise(distribution, ())
            if not torch.compiler.is_exporting() and noise.numel() != math.prod(shape):
                raise Undrawable(_refusal(shape, self._batch))
            return noise, axis
        multiples = [extent // self._batch if extent % self._batch == 0 else 0 for extent in shape]
        if not any(multiples):
            raise Undrawable(_refusal(shape, self._batch))
        at = multiples.index(1) if 1 in multiples else next(i for i, times in enumerate(multiples) if times)
        before = [extent for extent in shape[:at] if extent != 1]
        agents = [multiples[at]] if multiples[at] > 1 else []
        self._axes[self._drawn] = len(before)
        return self.noise(distribution, (*before, *agents, *shape[at + 1 :])), len(before)


def _refusal(shape: tuple[Any, ...], batch: int) -> str:
    return (
        f"the policy draws random numbers of shape {tuple(shape)} for a batch of {batch}: expected the batch first, so "
        "that each item has its own"
    )


def dtype_name(name: str, dtype: torch.dtype) -> DType:
    """The signature's name for a torch dtype. Raises `CaptureFailed` for a dtype that no client can send."""
    found = str(dtype).removeprefix("torch.")
    for known in get_args(DType):
        if found == known:
            result: DType = known
            return result
    raise CaptureFailed(
        f"{name}: expected one of {', '.join(get_args(DType))}; got {found}: take one of these, and convert it in "
        "the policy"
    )
