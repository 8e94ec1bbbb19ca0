"""ExportedProgram -> a `.pt2` package through AOTInductor: native code for one kind of host."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_compile_and_package

from app.errors import CaptureFailed
from exporters.capture import Captured

# Portable among x86-64 hosts of the last decade: the compiler's default is -march=native, which dies elsewhere.
_PORTABLE = {"x86_64": {"cpp.march": "x86-64-v3", "cpp.simdlen": 256}}
_FLAGS = {"x86_64": ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"]}


def build(captured: Captured, target: Path) -> dict[str, Any]:
    """Compile the program into `target`; returns what it requires of its host. Raises `CaptureFailed`.

    Takes 4 to 20 seconds and a C++ compiler.
    """
    machine = platform.machine()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor imports deprecated parts of torch itself
            aoti_compile_and_package(
                captured.program, package_path=str(target), inductor_configs=_PORTABLE.get(machine, {})
            )
    except Exception as error:
        raise CaptureFailed(
            f"AOTInductor could not compile the program: {' '.join(str(error).split())[:500]}"
        ) from error
    return {
        "platform": f"{platform.system()}-{machine}",
        "torch": torch.__version__.partition("+")[0],
        "glibc": platform.libc_ver()[1],
        "cpu_flags": _FLAGS.get(machine, []),
    }
