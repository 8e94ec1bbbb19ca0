"""AotiRuntime: `.pt2` packages made by AOTInductor. The only import of torch.

The package validates nothing (a wrong dtype gives wrong answers, a wrong rank a segmentation fault): `Runtime.run`
has checked names, dtypes, shapes and contiguity before an array comes here. It holds the GIL while it runs.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_load_package

from app.artifact import Artifact
from app.errors import RuntimeFailure
from app.runtimes.base import Runtime
from app.signature import Array, Signature


class AotiRuntime(Runtime):
    def __init__(self, signature: Signature, package: Any) -> None:
        super().__init__(signature)
        self._package = package

    @classmethod
    def load(cls, artifact: Artifact, threads: int) -> AotiRuntime:
        data = artifact.read_program("pt2")
        torch.set_num_threads(threads)
        # It warns when the program uses less than this CPU has; the preflight has made sure that it uses no more.
        logging.getLogger("torch.export.pt2_archive").setLevel(logging.ERROR)
        # The loader takes a path: it gets a private copy of the bytes that were hashed.
        with tempfile.NamedTemporaryFile(suffix=".pt2") as copy:
            Path(copy.name).write_bytes(data)
            try:
                package = aoti_load_package(copy.name)
            except Exception as error:
                raise RuntimeFailure(f"{artifact.label}: the AOTI loader refused the package: {error}") from error
        return cls(artifact.manifest.signature, package)

    def _run(self, arrays: list[Array]) -> list[Array]:
        try:
            outputs = self._package(*(torch.from_numpy(array) for array in arrays))
        except Exception as error:
            raise RuntimeFailure(f"the .pt2 program failed: {str(error).splitlines()[0][:300]}") from error
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return [tensor.contiguous().numpy() for tensor in outputs]

    def close(self) -> None:
        self._package = None
