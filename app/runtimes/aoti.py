"""AotiRuntime: `.pt2` packages made by AOTInductor. The only import of torch.

The package validates nothing (a wrong dtype gives wrong answers, a wrong rank a segmentation fault): `Runtime.run`
has checked names, dtypes, shapes and contiguity before an array comes here. It holds the GIL while it runs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_load_package

from app.artifact import Artifact
from app.errors import RuntimeFailure
from app.runtimes.base import Runtime, brief
from app.runtimes.probe import proven
from app.signature import Array, Signature


class AotiRuntime(Runtime):
    def __init__(self, signature: Signature, package: Any, device: str = "cpu") -> None:
        super().__init__(signature)
        self._package = package
        self._device = device

    @classmethod
    def load(cls, artifact: Artifact, threads: int) -> AotiRuntime:
        torch.set_num_threads(threads)
        with proven(artifact) as path:
            try:
                package = open_package(path)
            except Exception as error:
                raise RuntimeFailure(
                    f"{artifact.label}: the AOTI loader refused the package: {brief(error)}"
                ) from error
        device = artifact.manifest.programs["pt2"].requires.get("device") or "cpu"
        return cls(artifact.manifest.signature, package, device)

    def _run(self, arrays: list[Array]) -> list[Array]:
        try:
            return call(self._package, arrays, self._device)
        except Exception as error:
            raise RuntimeFailure(f"the .pt2 program failed: {brief(error)}") from error

    def close(self) -> None:
        self._package = None


def open_package(path: Path) -> Any:
    """The loaded package. Whatever the loader raises; a program that does not fit may end the process."""
    # It warns when the program uses less than this CPU has; the preflight has made sure that it uses no more.
    logging.getLogger("torch.export.pt2_archive").setLevel(logging.ERROR)
    return aoti_load_package(str(path))


def call(package: Any, arrays: list[Array], device: str) -> list[Array]:
    """Run a package on arrays of the host's memory, which are copied to and from `device` unless it is the CPU."""
    tensors = [torch.from_numpy(array) for array in arrays]
    outputs = package(*tensors) if device == "cpu" else package(*(tensor.to(device) for tensor in tensors))
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [tensor.contiguous().cpu().numpy() for tensor in outputs]
