"""Loads and calls AOTInductor packages. The only import of torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from actserve.core.signature import Array


def set_threads(count: int) -> None:
    """Set the number of threads of the inference calls of this thread, and of threads that have made none."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


_TMPDIR = threading.Lock()


@contextmanager
def _unpacking_into(folder: Path) -> Iterator[None]:
    """Have the loader unpack packages into `folder`. It deletes them only when a program is closed in good order."""
    with _TMPDIR:
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = str(folder)
        try:
            yield
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


def open_package(path: Path, device: str = "cpu") -> Any:
    """Load a package. Raises any exception; an incompatible program may end the process.

    On the CPU the folder of `path` can be deleted afterwards: the loader unpacks the program there, and its code is
    mapped. Programs for other devices read files later, so they are unpacked into the system's temporary directory.
    """
    if device != "cpu":
        torch.backends.cudnn.allow_tf32 = False  # by default, convolutions would round float32 to 10 bits
    # What `torch._inductor.aoti_load_package` returns is a wrapper around this. Importing it takes as long as torch
    # itself, and it parses the names of inputs and outputs anew for each call; ours are flat lists.
    with _unpacking_into(path.parent) if device == "cpu" else nullcontext():
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)


def call(package: Any, arrays: list[Array], device: str) -> list[Array]:
    """Run a package. Inputs and outputs are in host memory; for another `device` than the CPU they are copied."""
    tensors = [torch.from_numpy(array) for array in arrays]
    outputs = package.run(tensors if device == "cpu" else [tensor.to(device) for tensor in tensors])
    return [tensor.contiguous().cpu().numpy() for tensor in outputs]
