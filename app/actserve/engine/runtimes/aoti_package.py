"""AOTInductor packages, loaded and called. The only import of torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_load_package

from actserve.core.signature import Array


def set_threads(count: int) -> None:
    """How many threads a program may use, in the whole process."""
    torch.set_num_threads(count)


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
