"""ExportedProgram -> a `.pt2` package through AOTInductor: native code for one kind of host.

The default is portable code. The compiler's own default, -march=native, crashes on an older CPU; `native` selects it.
"""

from __future__ import annotations

import platform
import subprocess
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_compile_and_package
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa

from actserve.core.errors import CaptureFailed, one_line
from actserve_export.programs.elf import ElfRequirements, read_requirements

NATIVE = "native"
_PORTABLE = {  # hosts of the last decade: (march, vector width in bits)
    "x86_64": ("x86-64-v3", 256),
    "aarch64": ("armv8-a", 128),
}
_PORTABLE_BF16 = _PORTABLE | {"x86_64": ("x86-64-v4", 512)}  # every x86 processor with AVX512_BF16 has it
BF16_FLAGS = ("avx512_bf16", "bf16")  # x86, Arm
_BF16_UNITS = (*BF16_FLAGS, "amx_bf16", "amx_tile")  # what the layout of the weights depends on
_FAITHFUL = {"emulate_precision_casts": True}  # float16 and bfloat16 are rounded where the policy rounds them
# CPU features whose name in the compiler differs from the kernel's.
_ALIASES = {"lzcnt": "abm", "pclmul": "pclmulqdq", "sse3": "pni", "bmi": "bmi1", "sha": "sha_ni", "rdrnd": "rdrand",
            "lahf_sahf": "lahf_lm", "prfchw": "3dnowprefetch"}  # fmt: skip


def compile_program(
    program: torch.export.ExportedProgram, target: Path, native: bool = False, device: str = "cpu", bf16: bool = False
) -> dict[str, Any]:
    """Compile `program` into `target`; returns its requirements on the host. Raises `CaptureFailed`.

    `native` builds for this host's CPU instead of any CPU of the last decade. `device` is "cpu" or "cuda"; for "cuda"
    the program moves to the GPU first, which needs a CUDA build of torch. `bf16`: the program computes in bfloat16; its
    weights are laid out for this host's units for that. Takes 4 to 20 seconds and a C++ compiler.
    """
    if bf16 and not set(BF16_FLAGS) & _host_flags():
        raise CaptureFailed(
            f"bf16: expected a processor with {' or '.join(BF16_FLAGS)}; this one would be slower than in float32"
        )
    march, options = _options(native, bf16)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor itself imports deprecated parts of torch
            if device != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, device)
            aoti_compile_and_package(program, package_path=str(target), inductor_configs=options)
            flags = cpu_flags(march, options)
    except Exception as error:
        raise CaptureFailed(f"AOTInductor could not compile the program: {one_line(error)}") from error
    if bf16:
        flags = sorted({*flags, *set(_BF16_UNITS) & _host_flags()})
    needs = _needs(target)
    return {
        "platform": f"{platform.system()}-{platform.machine()}",
        "torch": torch.__version__.partition("+")[0],
        "march": march,
        "cpu_flags": flags,
        "glibc": needs.versions.get("GLIBC"),
        "glibcxx": needs.versions.get("GLIBCXX"),
        "cxxabi": needs.versions.get("CXXABI"),
        "needed": list(needs.libraries),
        "device": device,
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else None,
    }


def march_for(native: bool) -> str:
    """The architecture that `compile_program` builds for on this machine."""
    return NATIVE if native or platform.machine() not in _PORTABLE else _PORTABLE[platform.machine()][0]


def _options(native: bool, bf16: bool = False) -> tuple[str, dict[str, Any]]:
    """(march, Inductor's options for it)."""
    options: dict[str, Any] = dict(_FAITHFUL)
    if bf16:
        options["freezing"] = True  # lays the weights out beforehand
    if march_for(native) == NATIVE:
        return NATIVE, options
    march, width = (_PORTABLE_BF16 if bf16 else _PORTABLE)[platform.machine()]
    return march, options | {"cpp.march": march, "cpp.simdlen": width}


def cpu_flags(march: str, options: dict[str, Any]) -> list[str]:
    """The CPU features, by their Linux names, that the compiler may use for `march`, from its predefined macros."""
    with inductor.patch(options):
        isa = str(pick_vec_isa().build_arch_flags()).split()
    command = [get_cpp_compiler(), f"-march={march}", *isa, "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    features = {line.split()[1].strip("_").lower() for line in macros if line.startswith("#define __")}
    features = {_plain(_ALIASES.get(feature, feature)) for feature in features}
    return sorted(flag for flag in _host_flags() if _plain(flag) in features)


def _plain(flag: str) -> str:
    return flag.replace("_", "")  # the compiler writes AVX512VNNI for avx512_vnni


def _host_flags() -> set[str]:
    with open("/proc/cpuinfo") as file:
        line = next((line for line in file if line.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())


def _needs(package: Path) -> ElfRequirements:
    with zipfile.ZipFile(package) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        if len(libraries) != 1:
            raise CaptureFailed(f"expected one .so in the package that AOTInductor wrote; got {len(libraries)}")
        return read_requirements(archive.read(libraries[0]))
