"""What the exporter starts from: a trained policy and what must be known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn

from actserve.core.environment import Environment
from actserve.core.signature import Arrays, Exploration
from actserve_export.sources.interfaces import Original
from actserve_export.sources.keys import join


@dataclass(frozen=True)
class PolicySource:
    """A policy to export.

    `policy` takes and gives tensordicts; its in_keys are the observations.
    `example` holds one item's inputs, without a batch axis; an entry's dtype and shape become the signature's.
    `outputs` are the keys that the program gives, the action first; by default the action, and of action values,
    logits, distribution parameters and log-probabilities what the policy writes.
    `exploration` says how the exported policy can act; by default every way that it can.
    `observe(n)` gives a TensorDict of n real observations, batch size [n], for the certificate; without it random
    inputs within each dtype's range are used. `observed_in` says where they come from.
    `environment` is what a client must reproduce to play; None where there is no game.
    `weights` is the part of `policy` that a checkpoint fills; by default all of it.
    `library` is what ran the policy in training; where that is not TorchRL, `original` acts as it did there.
    """

    policy: TensorDictModuleBase
    example: TensorDict
    outputs: tuple[str, ...] = ()
    exploration: tuple[Exploration, ...] | None = None
    observe: Callable[[int], TensorDict] | None = None
    environment: Environment | None = None
    weights: nn.Module | None = None
    library: str = "TorchRL"
    original: Original | None = None
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

    def highest(self, name: str) -> int:
        """The largest number that an integer observation is known to have: it may be an index."""
        return int(_named(self.example)[name].max())


def _named(tensordict: TensorDict) -> Arrays:
    return {join(key): tensordict.get(key).numpy() for key in tensordict.keys(include_nested=True, leaves_only=True)}
