"""Ports: what a program takes and gives beside observations and outputs: state, the reset flag, noise, parameters.

One mechanism for all of them. A module inside the policy asks for what it needs; the first, eager run notes what was
asked for, which becomes the signature; in every later run, traced or eager, what it gets are the program's inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from actserve.core.completion import draw_noise
from actserve.core.errors import CaptureFailed
from actserve.core.signature import IS_INIT, Distribution, DType, Noise, Parameter, State, TensorSpec


class Ports:
    """Asked by the policy's modules as it runs. `begin` before each run; `given` after it has the new state."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}
        self.parameters: dict[str, Parameter] = {}
        self.noises: list[Noise] = []
        self.takes_is_init = False
        self.given: dict[str, Tensor] = {}
        self._bound: Mapping[str, Tensor] | None = None
        self._batch: Any = 0
        self._drawn = 0

    def clear(self) -> None:
        """Forget what was noted."""
        self.states.clear()
        self.parameters.clear()
        self.noises.clear()
        self.takes_is_init = False

    def begin(self, batch: Any, bound: Mapping[str, Tensor] | None) -> None:
        """A run of `batch` items, an int or symbolic. `bound` are the program's inputs; None: note what is asked."""
        self._batch, self._bound = batch, bound
        self._drawn = 0

    @property
    def batch(self) -> Any:
        return self._batch

    def state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, initial: float = 0.0) -> Tensor:
        """The state tensor `name`, (B, *shape)."""
        if self._bound is not None:
            return self._bound[name]
        self.states[name] = State(TensorSpec(name, dtype_name(name, dtype), tuple(shape)), f"next_{name}", initial)
        return torch.full((self._batch, *shape), initial, dtype=dtype)

    def replace(self, name: str, tensor: Tensor) -> None:
        """What `name` is in the next step, (B, *shape)."""
        self.given[name] = tensor

    def is_init(self) -> Tensor:
        """(B,) bool: which items begin an episode."""
        if self._bound is not None:
            return self._bound[IS_INIT.name]
        self.takes_is_init = True
        return torch.ones(self._batch, dtype=torch.bool)

    def parameter(self, name: str, default: float, low: float, high: float | None = None) -> Tensor:
        """(B,) float32."""
        if self._bound is not None:
            return self._bound[name]
        self.parameters[name] = Parameter(name, default, low, high)
        return torch.full((self._batch,), default)

    def noise(self, distribution: Distribution, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) float32 of the standard `distribution`. The n-th call of a run is the n-th noise input."""
        index = self._drawn
        self._drawn += 1
        if self._bound is not None:
            return self._bound[self.noises[index].spec.name]
        name = "noise" if index == 0 else f"noise_{index}"
        noise = Noise(TensorSpec(name, "float32", tuple(shape)), distribution)
        self.noises.append(noise)
        return torch.from_numpy(draw_noise((noise,), seed=0, size=self._batch)[name])


def dtype_name(name: str, dtype: torch.dtype) -> DType:
    """torch's dtype as a signature spells it. Raises `CaptureFailed` for one that no client can send."""
    found = str(dtype).removeprefix("torch.")
    for known in get_args(DType):
        if found == known:
            result: DType = known
            return result
    raise CaptureFailed(f"{name}: expected one of {', '.join(get_args(DType))}; got {found}")
