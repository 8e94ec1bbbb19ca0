"""Runtime: the interface of a loaded program, implemented once per engine."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from actserve.core.errors import RefusedByProgram, RuntimeFailure
from actserve.core.signature import Array, Arrays, Signature, describe
from actserve.store.artifact import Artifact


class Runtime(ABC):
    """One loaded program. It has no state between runs. Only one thread at a time may call `run`."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        # A compiled program leaves out the rounding of float32 that becomes float32 again.
        self._halves = [spec for spec in signature.results if spec.dtype == "bfloat16"]
        self._policy = ""
        self._proven: list[Array] = []  # inputs on which the program has run

    def prove(self, policy: str, inputs: Mapping[str, Array]) -> None:
        """Say that `policy`'s program runs on `inputs`, each (n, *shape): a later failure is due to other inputs."""
        self._policy = policy
        self._proven = [inputs[spec.name][:1].copy() for spec in self.signature.inputs]

    @classmethod
    @abstractmethod
    def load(cls, artifact: Artifact, threads: int, shared: Path | None = None) -> Runtime:
        """Verify and open the artifact's program; a call takes so many `threads`.

        `shared` is a folder of this service where its workers may share files. Raises `StoreError` or `RuntimeFailure`.
        """

    def with_threads(self, threads: int) -> Runtime:
        """The same program for calls with another number of threads, sharing what it can; this one if that is all one.

        Raises as `load`.
        """
        return self

    def run(self, batch: Mapping[str, Array]) -> Arrays:
        """One inference call. `batch`: every input of the signature, each (B, *shape), 1 <= B <= max_batch.

        Returns every result of the signature, outputs and new state, each (B, *shape). Raises `InvalidTensor` for
        inputs that violate the signature, before the program runs; `RefusedByProgram` if the program fails on them and
        still runs on others; and `RuntimeFailure` if the engine fails.
        """
        size = self.signature.validate(batch)
        if size > self.signature.max_batch:
            raise RuntimeFailure(f"the program takes at most {self.signature.max_batch} items a call; got {size}")
        return self.run_unchecked(batch)

    def run_unchecked(self, batch: Mapping[str, Array]) -> Arrays:
        """As `run`, without a look at the inputs: NaN and values out of bounds reach the program."""
        size = len(next(iter(batch.values())))
        try:
            arrays = self._run([batch[spec.name] for spec in self.signature.inputs])
        except RuntimeFailure as error:
            if not self._proven or _OUT_OF_MEMORY.search(error.message):
                raise
            self._run(self._proven)
            raise RefusedByProgram(self._policy, error.message) from error
        for spec, array in zip(self.signature.results, arrays, strict=True):
            if array.shape != (size, *spec.shape) or array.dtype != spec.numpy_dtype:
                raise RuntimeFailure(f"{spec.name}: the program gave {describe(array)}; the manifest says {spec}")
        results = {spec.name: array for spec, array in zip(self.signature.results, arrays, strict=True)}
        for spec in self._halves:
            results[spec.name] = spec.from_wire(spec.to_wire(results[spec.name]))
        return results

    @abstractmethod
    def _run(self, arrays: list[Array]) -> list[Array]:
        """Validated inputs, in the signature's order -> results, in the signature's order."""

    @abstractmethod
    def close(self) -> None:
        """Free the program's memory. The runtime cannot be used afterwards."""


_OUT_OF_MEMORY = re.compile("alloc|memory", re.IGNORECASE)


def brief(error: Exception) -> str:
    """The first line of an engine's message, without folder names: paths must not leave the process."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"(?:/[\w.+-]+)+/", "", lines[0])[:300]
