"""The protocols between the steps of an export: the user's policy, and the captured policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from actserve.core.environment import Contract
from actserve.core.signature import Arrays, Signature
from actserve.store.artifact import Program


@dataclass(frozen=True)
class OriginalPolicy:
    """The policy in its training library, acting deterministically. The captured policy is compared with it.

    `act` takes every input by name, each (B, *shape), and returns the action and new state by name. `name` is the call
    that it makes, for the certificate.
    """

    name: str
    act: Callable[[Arrays], Arrays]


class ExportSource(Protocol):
    """A policy to export."""

    @property
    def environment(self) -> Contract | None: ...

    @property
    def reference(self) -> str:
        """The name of the policy that programs are compared with, for the certificate."""

    @property
    def original(self) -> OriginalPolicy | None: ...

    @property
    def samples_from(self) -> str:
        """The origin of `observations`, for the certificate."""

    def observations(self, count: int) -> Arrays | None:
        """`count` real observations by name, each (count, *shape), or None."""

    def largest_value(self, name: str) -> int:
        """The largest value that the integer observation `name` is known to take; it may be an index."""

    def is_covariance(self, name: str) -> bool:
        """Whether the observation `name` is known to be a covariance: symmetric, with positive eigenvalues."""


class CapturedPolicy(Protocol):
    """The policy that programs are built from and compared with."""

    @property
    def signature(self) -> Signature: ...

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The runtimes that it can be built for."""

    @property
    def single_item_reason(self) -> str | None:
        """Why the program takes one item a call; None: it takes batches."""

    def run_reference(self, inputs: Mapping[str, Any]) -> Arrays:
        """The results of the policy itself. `inputs` by name, each (B, *shape)."""

    def graph(self) -> str:
        """The graph as readable text."""

    def weights_sha256(self) -> str: ...

    def save(self, folder: Path, programs: Mapping[str, Program]) -> dict[str, Path]:
        """Write the other files of the artifact into `folder`, where `build` has put `programs`; paths by name."""

    def build(self, runtime: str, folder: Path, target: Mapping[str, Any]) -> Program:
        """Write the program for `runtime` into `folder`. Raises `CaptureFailed`."""
