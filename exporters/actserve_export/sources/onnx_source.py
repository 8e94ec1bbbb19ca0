"""OnnxSource: a policy that is an `.onnx` file already; the policy that it was made from is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import onnxruntime as ort

from actserve.core.environment import Environment
from actserve.core.signature import Arrays


@dataclass(frozen=True)
class OnnxSource:
    """A policy that is an `.onnx` file.

    Every input has the batch first: of any size, or 1, and then it takes one item at a time.
    `outputs` are those that the program gives, the action first; by default all of them, in the graph's order.
    `action` "argmax": the first output has one value for each action, (B, n), and the best one is given before it, as
    `action`. `state` maps inputs to the outputs that replace them in the next step; they begin at zero.
    `observe(n)` gives n real observations by name, each (n, *shape); `environment` is what a client must reproduce.
    """

    path: Path | str
    outputs: tuple[str, ...] = ()
    action: str = "identity"
    state: Mapping[str, str] = field(default_factory=dict)
    observe: Callable[[int], Arrays] | None = None
    environment: Environment | None = None

    original: ClassVar[None] = None
    reference: ClassVar[str] = (
        f"the .onnx file as it was given, item by item, in ONNX Runtime {ort.__version__}; "
        "the policy that it was made from was not there to compare with"
    )

    @property
    def samples_from(self) -> str:
        return "random and boundary values" if self.observe is None else "environment"

    def observations(self, count: int) -> Arrays | None:
        """`count` real observations by name, each (count, *shape); None without `observe`."""
        return None if self.observe is None else self.observe(count)

    def highest(self, name: str) -> int:
        """The largest number that an integer observation is known to have: it may be an index."""
        return 1
