"""AotiRuntime: runs `.pt2` packages made by AOTInductor.

The package validates nothing: a wrong dtype gives wrong answers, and a wrong rank a segmentation fault. `Runtime.run`
checks names, dtypes, shapes and contiguity before it calls `_run`. The package holds the GIL while it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actserve.core.errors import RuntimeFailure
from actserve.core.signature import Array, Signature
from actserve.engine.runtimes.aoti_package import call, open_package, set_threads
from actserve.engine.runtimes.base import Runtime, brief
from actserve.engine.runtimes.probe import probed_copy
from actserve.store.artifact import Artifact


class AotiRuntime(Runtime):
    def __init__(self, signature: Signature, package: Any, device: str = "cpu", threads: int = 1) -> None:
        super().__init__(signature)
        self._package = package
        self._device = device
        self._threads = threads

    @classmethod
    def load(cls, artifact: Artifact, threads: int, shared: Path | None = None) -> AotiRuntime:
        set_threads(threads)
        device = artifact.manifest.programs["pt2"].requires.get("device") or "cpu"
        with probed_copy(artifact) as path:
            try:
                package = open_package(path, device)
            except Exception as error:
                raise RuntimeFailure(
                    f"{artifact.label}: the AOTI loader refused the package: {brief(error)}"
                ) from error
        return cls(artifact.manifest.signature, package, device, threads)

    def with_threads(self, threads: int) -> AotiRuntime:
        if self._device != "cpu":
            return self
        return AotiRuntime(self.signature, self._package, self._device, threads)

    def _run(self, arrays: list[Array]) -> list[Array]:
        set_threads(self._threads)
        try:
            return call(self._package, arrays, self._device)
        except Exception as error:
            raise RuntimeFailure(f"the .pt2 program failed: {brief(error)}") from error

    def close(self) -> None:
        self._package = None
