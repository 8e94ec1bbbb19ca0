"""What publishing needs to know of a source and of what was captured of it, wherever the policy comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from actserve.core.environment import Environment
from actserve.core.signature import Arrays, Signature
from actserve.store.artifact import Program


@dataclass(frozen=True)
class Original:
    """A policy as the library that trained it acts, deterministically: what is captured is held against it.

    `act` takes every input by name, each (B, *shape), and gives the action and new state by name. `name` says, for the
    certificate, what was called.
    """

    name: str
    act: Callable[[Arrays], Arrays]


class Source(Protocol):
    """A policy to export."""

    @property
    def environment(self) -> Environment | None: ...

    @property
    def reference(self) -> str:
        """What programs are compared with, for the certificate."""

    @property
    def original(self) -> Original | None: ...

    @property
    def samples_from(self) -> str:
        """What the certificate's observations are, for the certificate."""

    def observations(self, count: int) -> Arrays | None:
        """`count` real observations by name, each (count, *shape); None: there are none."""

    def highest(self, name: str) -> int:
        """The largest number that an integer observation is known to have: it may be an index."""


class Exportable(Protocol):
    """A captured policy: what programs are built from and compared with."""

    @property
    def signature(self) -> Signature: ...

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Those that it can be built for."""

    def run_reference(self, inputs: Mapping[str, Any]) -> Arrays:
        """The policy's own answers. `inputs` by name, each (B, *shape)."""

    def graph(self) -> str:
        """The graph, for people."""

    def weights_sha256(self) -> str: ...

    def save(self, folder: Path, programs: Mapping[str, Program]) -> dict[str, Path]:
        """Write the other files of the artifact into `folder`, where `build` has put `programs`; paths by name."""

    def build(self, runtime: str, folder: Path, target: Mapping[str, Any]) -> Program:
        """Write the program for `runtime` into `folder`. Raises `CaptureFailed`."""
