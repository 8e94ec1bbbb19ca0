"""OnnxSource: a policy from an `.onnx` file. The model that the file was exported from is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime as ort

from actserve.core.environment import Contract
from actserve.core.signature import Arrays, Chunk
from actserve_export.sources.robot_files import robot_in


@dataclass(frozen=True)
class OnnxSource:
    """A policy that is an `.onnx` file.

    The first axis of each input and output is the batch, or another one if only that is open. `batch_axes` says it for
    tensors by name: {"h_in": 1} for [layers, batch, hidden]; requests always have the batch first. If the file fixes
    the batch at 1, the policy takes one item at a time.
    `outputs` names the outputs of the program, the action first; by default all of the file's that depend on an input.
    `constants` gives inputs that are settings, such as `is_training`, a number or an array for good.
    `action` "argmax": the first output has one value per action, (B, n); the program returns the best action before it,
    as `action`. "identity": the first output is the action.
    `state` maps inputs to the outputs that replace them in the next step. State starts at zero.
    `chunk` says which output plans several actions ahead, (horizon, *shape of an action).
    `observe(n)` returns n real observations by name, each (n, *shape). A client must reproduce `environment`; by
    default it is the robot that the file's metadata describes, if any.
    """

    path: Path | str
    outputs: tuple[str, ...] = ()
    action: str = "identity"
    state: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    batch_axes: Mapping[str, int] = field(default_factory=dict)
    observe: Callable[[int], Arrays] | None = None
    environment: Contract | None = None
    chunk: Chunk | None = None

    def __post_init__(self) -> None:
        if self.environment is None:
            object.__setattr__(self, "environment", robot_in(Path(self.path)))

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

    def largest_value(self, name: str) -> int:
        """1: an `.onnx` file does not say which values are valid."""
        return 1

    def is_covariance(self, name: str) -> bool:
        """False: an `.onnx` file does not say which values are valid."""
        return False
