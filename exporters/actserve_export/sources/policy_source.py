"""PolicySource: a trained policy with everything that the export needs to know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import TensorSpec

from actserve.core.environment import Contract
from actserve.core.errors import CaptureFailed
from actserve.core.signature import Arrays, Chunk, Exploration
from actserve_export.sources.interfaces import OriginalPolicy
from actserve_export.sources.keys import key_name
from actserve_export.sources.tensors import to_array

ArrayLike: TypeAlias = Tensor | np.ndarray[Any, Any] | Sequence[Any] | float


def as_tensors(example: Mapping[str, Any] | TensorDictBase) -> dict[str, Tensor | TensorDictBase]:
    """The values of an example as tensors, nested as it is. Raises `CaptureFailed` with the name of another value."""
    found: dict[str, Tensor | TensorDictBase] = {}
    for name, value in example.items():
        try:
            nested = isinstance(value, (Mapping, TensorDictBase))
            found[name] = TensorDict(as_tensors(value)) if nested else torch.as_tensor(value).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise CaptureFailed(f"{name}: expected a tensor as the example; got {type(value).__name__}") from error
    return found


@dataclass(frozen=True)
class PolicySource:
    """A policy to export.

    `policy` takes and returns tensordicts; its in_keys are the observations.
    `example` holds the inputs of one item, without a batch axis; a dict of arrays will do. The signature takes dtypes
    and shapes from it.
    `outputs` are the keys that the program returns, the action first. By default these are the action and, if the
    policy writes them, action values, logits, distribution parameters and log-probabilities.
    `exploration` lists the modes of the exported policy; by default every mode that it supports.
    `observe(n)` returns a TensorDict of n real observations, batch size [n], for the certificate. `observed_in`
    says where they come from. Without `observe`, the certificate uses random inputs within each dtype's range.
    `spec` states the bounds of integer observations: TorchRL's observation spec, such as `env.observation_spec`. Bounds
    that the policy's own embeddings and one-hot encodings state are found without it.
    `chunk` says which output plans several actions ahead, (horizon, *shape of an action).
    `environment` is the contract that a client must reproduce to play; None if the policy plays no game.
    `weights` is the part of `policy` that a checkpoint fills; by default all of it.
    `library` is the library that trained the policy. If that is not TorchRL, `original` runs the policy there.
    """

    policy: TensorDictModuleBase
    example: TensorDict
    outputs: tuple[str, ...] = ()
    exploration: tuple[Exploration, ...] | None = None
    observe: Callable[[int], TensorDict] | None = None
    environment: Contract | None = None
    weights: nn.Module | None = None
    library: str = "TorchRL"
    original: OriginalPolicy | None = None
    observed_in: str = "environment"
    spec: TensorSpec | None = None
    chunk: Chunk | None = None
    left_out: str = ""  # set by the capture: outputs that are left out, and why

    def __post_init__(self) -> None:
        if not isinstance(self.policy, nn.Module) or not hasattr(self.policy, "in_keys"):
            raise CaptureFailed(
                f"expected a module that takes and returns tensordicts as the policy; got {type(self.policy).__name__} "
                "(from_module makes a policy of an nn.Module)"
            )
        if not isinstance(self.example, (TensorDictBase, Mapping)):
            raise CaptureFailed(f"expected an example by key; got {type(self.example).__name__}")
        if not isinstance(self.example, TensorDictBase):
            object.__setattr__(self, "example", TensorDict(as_tensors(self.example)))

    @property
    def reference(self) -> str:
        return f"the {self.library} policy, eager, on the CPU"

    @property
    def samples_from(self) -> str:
        return "random and boundary values" if self.observe is None else self.observed_in

    def observations(self, count: int) -> Arrays | None:
        """`count` real observations by name, each (count, *shape); None without `observe`."""
        return None if self.observe is None else _named(self.observe(count))

    def largest_value(self, name: str) -> int:
        """The largest value of the integer observation `name` in the example; it may be an index."""
        known = _named(self.example).get(name)
        return 1 if known is None else int(known.max())

    def is_covariance(self, name: str) -> bool:
        """Whether the observation `name` is a covariance in the example: symmetric, with positive eigenvalues."""
        value = _named(self.example).get(name)
        if value is None or value.dtype.kind != "f" or value.ndim < 2:
            return False
        if value.shape[-1] != value.shape[-2] or value.shape[-1] == 1:
            return False
        return bool((value == value.swapaxes(-1, -2)).all() and (np.linalg.eigvalsh(value) > 0).all())


def _named(tensordict: TensorDict) -> Arrays:
    return {
        key_name(key): to_array(tensordict.get(key)) for key in tensordict.keys(include_nested=True, leaves_only=True)
    }
