"""Checks whether this host can run a program, before the file is opened: an incompatible program could crash."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actserve.core.errors import RuntimeRefused
from actserve.engine.runtimes.host import Host, Version, dotted, this_host
from actserve.engine.runtimes.load import RUNTIMES
from actserve.store.artifact import Manifest

__all__ = ["Choice", "Host", "choose", "refusal", "this_host"]


@dataclass(frozen=True)
class Choice:
    """The runtime to use, and the reason as text."""

    runtime: str
    reason: str


def refusal(runtime: str, manifest: Manifest, host: Host) -> str | None:
    """Why `host` cannot run this program, or None. Only the most basic reason is returned."""
    program = manifest.programs.get(runtime)
    if program is None:
        return f"{manifest.name}@{manifest.version} has no .{runtime} program"
    package = {"onnx": "onnxruntime", "pt2": "torch"}[runtime]
    if package not in host.packages:
        return f"{package} is not installed here"
    requires = {name: needed for name, needed in program.requires.items() if needed is not None}
    unknown = [f"{name} {requires[name]!r}"[:100] for name in sorted(requires.keys() - _CHECKS.keys())]
    if unknown:  # from a newer actserve
        return f"requires something this actserve does not know: {', '.join(unknown)}"
    for name, check in _CHECKS.items():
        if name in requires and (reason := _apply(name, check, requires[name], host)):
            return reason
    return None


def choose(
    wanted: str, manifest: Manifest, host: Host, failed: Mapping[str, str], fastest: str | None = None
) -> Choice:
    """The runtime to use. `wanted` is "auto", "onnx" or "pt2".

    `failed` are the runtimes that failed to load, with their errors; `fastest` is the result of `actserve tune` on this
    host. Raises `RuntimeRefused` if this host can run none of the programs.
    """
    candidates = sorted(["pt2", "onnx"], key=lambda runtime: runtime != fastest) if wanted == "auto" else [wanted]
    refused: list[str] = []
    for runtime in candidates:
        reason = failed.get(runtime) or refusal(runtime, manifest, host)
        if reason is None:
            why = f"asked for by --runtime {wanted}" if wanted != "auto" else "the first that this host can run"
            if wanted == "auto" and runtime == fastest:
                why = "the fastest on this host, as actserve tune measured"
            return Choice(runtime, "; ".join([*refused, f".{runtime}: {why}"]))
        refused.append(f"not .{runtime}: {reason}")
    label = f"{manifest.name}@{manifest.version}"
    raise RuntimeRefused(f"{label} cannot run here: {'; '.join(refused)}", runtimes=sorted(RUNTIMES))


Check = Callable[[Any, Host], str | None]


def _apply(name: str, check: Check, needed: Any, host: Host) -> str | None:
    try:
        return check(needed, host)
    except (TypeError, ValueError, AttributeError):
        return f"requires {name} {needed!r}"[:200] + ", which this actserve cannot read"


def _check_platform(needed: str, host: Host) -> str | None:
    here = f"{host.system}-{host.machine}"
    return None if needed == here else f"built for {needed}, this host is {here}"


def _check_device(needed: str, host: Host) -> str | None:
    return None if needed in host.devices else f"built for {needed}, this host has {' and '.join(host.devices)}"


def _check_compute_capability(needed: str, host: Host) -> str | None:
    """The versions must be equal, because a package contains machine code for one compute capability."""
    if host.compute_capability == _version(needed):
        return None
    here = dotted(host.compute_capability) or "no CUDA device"
    return f"built for compute capability {needed}, this host has {here}"


def _check_torch(needed: str, host: Host) -> str | None:
    here = host.packages["torch"]
    return None if needed == here else f"built for torch {needed}, this host has {here}"


def _check_march(needed: str, host: Host) -> str | None:
    if needed == "native":  # `cpu_flags` lists the required features
        return None
    if needed not in _MARCHES:
        return f"built for the CPU architecture {needed}, which this actserve does not know"
    missing = sorted(_MARCHES[needed] - host.cpu_flags)
    return f"built for {needed} CPUs, this host lacks {', '.join(missing)}" if missing else None


def _check_cpu(needed: list[str], host: Host) -> str | None:
    if isinstance(needed, str):
        raise TypeError
    missing = sorted(set(needed) - host.cpu_flags)
    return f"needs the CPU features {', '.join(missing)}, which this host lacks" if missing else None


def _at_least(name: str, here: Callable[[Host], Version]) -> Check:
    def check(needed: str, host: Host) -> str | None:
        found = here(host)
        return None if _version(needed) <= found else f"needs {name} {needed}, this host has {dotted(found) or 'none'}"

    return check


def _check_needed(needed: list[str], host: Host) -> str | None:
    if isinstance(needed, str):
        raise TypeError
    missing = sorted(set(needed) - (host.libraries if host.libraries is not None else set(needed)))
    return f"needs the libraries {', '.join(missing)}, which this host does not have" if missing else None


def _version(text: str) -> Version:
    if not re.fullmatch(r"\d+(\.\d+)*", text):
        raise ValueError(text)
    return tuple(map(int, text.split(".")))


_V2 = frozenset(("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"))
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_MARCHES = {  # CPU features by architecture, as in /proc/cpuinfo; https://gitlab.com/x86-psABIs/x86-64-ABI
    "x86-64": frozenset[str](),
    "x86-64-v2": _V2,
    "x86-64-v3": _V3,
    "x86-64-v4": _V4,
    "armv8-a": frozenset(("asimd",)),
}

_CHECKS: dict[str, Check] = {  # the most basic first
    "platform": _check_platform,
    "device": _check_device,
    "compute_capability": _check_compute_capability,
    "torch": _check_torch,
    "march": _check_march,
    "cpu_flags": _check_cpu,
    "glibc": _at_least("glibc", lambda host: host.glibc),
    "glibcxx": _at_least("GLIBCXX", lambda host: host.glibcxx),
    "cxxabi": _at_least("CXXABI", lambda host: host.cxxabi),
    "needed": _check_needed,
    "opset": lambda needed, host: None,  # ONNX Runtime checks it on load
}
