"""Can this host run that program? Decided before the file is opened: a refusal is a sentence, not a crash."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

from app.artifact import Manifest
from app.errors import RuntimeRefused
from app.runtimes.base import RUNTIMES


@dataclass(frozen=True)
class Host:
    """What this machine offers. `packages` are versions without build tags; `cpu_flags` as Linux spells them."""

    system: str
    machine: str
    glibc: tuple[int, ...]
    cpu_flags: frozenset[str]
    packages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The runtime to use and, for people, why."""

    runtime: str
    reason: str


@cache
def this_host() -> Host:
    return Host(
        system=platform.system(),
        machine=platform.machine(),
        glibc=_numbers(platform.libc_ver()[1]),
        cpu_flags=_cpu_flags(),
        packages={name: version for name in ("torch", "onnxruntime") if (version := _installed(name))},
    )


def refusal(runtime: str, manifest: Manifest, host: Host) -> str | None:
    """Why `host` cannot run this program, or None. The one reason that matters, the most basic first."""
    program = manifest.programs.get(runtime)
    if program is None:
        return f"{manifest.name}@{manifest.version} has no .{runtime} program"
    package = {"onnx": "onnxruntime", "pt2": "torch"}[runtime]
    if package not in host.packages:
        return f"{package} is not installed here"
    for requirement, check in _CHECKS.items():
        needed = program.requires.get(requirement)
        if needed is not None and (reason := check(needed, host)):
            return reason
    return None


def choose(wanted: str, manifest: Manifest, host: Host, failed: Mapping[str, str]) -> Choice:
    """The runtime for `wanted` ("auto", "onnx" or "pt2"); `failed` says which were tried already, and what happened.

    Raises `RuntimeRefused` if none can be had.
    """
    candidates = ["pt2", "onnx"] if wanted == "auto" else [wanted]
    refused: list[str] = []
    for runtime in candidates:
        reason = failed.get(runtime) or refusal(runtime, manifest, host)
        if reason is None:
            why = f"asked for by --runtime {wanted}" if wanted != "auto" else "the first that this host can run"
            return Choice(runtime, "; ".join([*refused, f".{runtime}: {why}"]))
        refused.append(f"not .{runtime}: {reason}")
    label = f"{manifest.name}@{manifest.version}"
    raise RuntimeRefused(f"{label} cannot run here: {'; '.join(refused)}", runtimes=sorted(RUNTIMES))


def _check_platform(needed: str, host: Host) -> str | None:
    here = f"{host.system}-{host.machine}"
    return None if needed == here else f"built for {needed}, this host is {here}"


def _check_torch(needed: str, host: Host) -> str | None:
    here = host.packages["torch"]
    return None if needed == here else f"built for torch {needed}, this host has {here}"


def _check_glibc(needed: str, host: Host) -> str | None:
    here = ".".join(map(str, host.glibc))
    return None if _numbers(needed) <= host.glibc else f"needs glibc {needed}, this host has {here or 'none'}"


def _check_cpu(needed: list[str], host: Host) -> str | None:
    missing = sorted(set(needed) - host.cpu_flags)
    return f"needs the CPU features {', '.join(missing)}, which this host lacks" if missing else None


_CHECKS: dict[str, Callable[[Any, Host], str | None]] = {
    "platform": _check_platform,
    "torch": _check_torch,
    "glibc": _check_glibc,
    "cpu_flags": _check_cpu,
}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return frozenset()
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None
