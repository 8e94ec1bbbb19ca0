"""PolicySource: a trained policy with everything that the export needs to know about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn

from actserve.core.environment import Environment
from actserve.core.signature import Arrays, Exploration
from actserve_export.sources.interfaces import OriginalPolicy
from actserve_export.sources.keys import key_name


@dataclass(frozen=True)
class PolicySource:
    """A policy to export.

    `policy` takes and returns tensordicts; its in_keys are the observations.
    `example` holds the inputs of one item, without a batch axis. The signature takes dtypes and shapes from it.
    `outputs` are the keys that the program returns, the action first. By default these are the action and, if the
    policy writes them, action values, logits, distribution parameters and log-probabilities.
    `exploration` lists the modes of the exported policy; by default every mode that it supports.
    `observe(n)` returns a TensorDict of n real observations, batch size [n], for the certificate. `observed_in`
    says where they come from. Without `observe`, the certificate uses random inputs within each dtype's range.
    `environment` is the contract that a client must reproduce to play; None if the policy plays no game.
    `weights` is the part of `policy` that a checkpoint fills; by default all of it.
    `library` is the library that trained the policy. If that is not TorchRL, `original` runs the policy there.
    """

    policy: TensorDictModuleBase
    example: TensorDict
    outputs: tuple[str, ...] = ()
    exploration: tuple[Exploration, ...] | None = None
    observe: Callable[[int], TensorDict] | None = None
    environment: Environment | None = None
    weights: nn.Module | None = None
    library: str = "TorchRL"
    original: OriginalPolicy | None = None
    observed_in: str = "environment"

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
        return int(_named(self.example)[name].max())


def _named(tensordict: TensorDict) -> Arrays:
    return {
        key_name(key): tensordict.get(key).numpy() for key in tensordict.keys(include_nested=True, leaves_only=True)
    }
