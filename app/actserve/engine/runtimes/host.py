"""Host: the properties of this machine that programs depend on. Detected without loading an engine."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

Version = tuple[int, ...]


@dataclass(frozen=True)
class Host:
    """Properties of a machine. `packages` are versions without build tags; `cpu_flags` have Linux's names."""

    system: str
    machine: str
    glibc: Version
    cpu_flags: frozenset[str]
    packages: dict[str, str] = field(default_factory=dict)
    glibcxx: Version = ()  # the newest GLIBCXX_ symbol version of this process's libstdc++
    cxxabi: Version = ()  # the newest CXXABI_ symbol version
    libraries: frozenset[str] | None = None  # file names that the dynamic loader can find; None: unknown
    devices: tuple[str, ...] = ("cpu",)
    compute_capability: Version = ()  # of the first CUDA device; () without one

    def facts(self) -> dict[str, Any]:
        """JSON-able, for people; without the list of libraries."""
        return {
            "platform": f"{self.system}-{self.machine}",
            "glibc": dotted(self.glibc),
            "glibcxx": dotted(self.glibcxx),
            "cxxabi": dotted(self.cxxabi),
            "devices": list(self.devices),
            "compute_capability": dotted(self.compute_capability),
            "packages": dict(self.packages),
            "cpu_flags": sorted(self.cpu_flags),
        }


@cache
def this_host() -> Host:
    packages = {name: version for name in ("torch", "onnxruntime") if (version := _installed(name))}
    capability = _cuda_capability() if "torch" in packages and not _full_version("torch").endswith("+cpu") else ()
    libstdcxx = _libstdcxx()
    return Host(
        system=platform.system(),
        machine=platform.machine(),
        glibc=_numbers(platform.libc_ver()[1]),
        cpu_flags=_cpu_flags(),
        packages=packages,
        glibcxx=newest(libstdcxx, "GLIBCXX"),
        cxxabi=newest(libstdcxx, "CXXABI"),
        libraries=_libraries(),
        devices=("cpu", "cuda") if capability else ("cpu",),
        compute_capability=capability,
    )


def newest(library: bytes, name: str) -> Version:
    """The highest symbol version `name`_x.y.z in a library's bytes; () if there is none."""
    found = re.findall(name.encode() + rb"_(\d+(?:\.\d+)+)\0", library)
    return max((_numbers(version.decode()) for version in found), default=())


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _numbers(version: str) -> Version:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _libstdcxx() -> bytes:
    """The bytes of this process's libstdc++, which is loaded if it is not yet. Empty if there is none."""
    path = _mapped_path("libstdc++.so")
    if path is None and sys.platform == "linux":
        try:
            ctypes.CDLL("libstdc++.so.6")
        except OSError:
            return b""
        path = _mapped_path("libstdc++.so")
    try:
        return Path(path).read_bytes() if path else b""
    except OSError:
        return b""


def _mapped_path(name: str) -> str | None:
    """The path of the mapped library whose file name starts with `name`."""
    try:
        with open("/proc/self/maps") as file:
            paths = (line.split(maxsplit=5)[5].strip() for line in file if name in line)
            return next((path for path in paths if os.path.basename(path).startswith(name)), None)
    except OSError:
        return None


def _libraries() -> frozenset[str] | None:
    """The libraries that the dynamic loader finds by name: its cache, the default folders, torch's own folder and those
    of NVIDIA's packages beside it, and what this process has loaded, such as the driver."""
    if sys.platform != "linux":
        return None
    try:
        cached = re.findall(rb"[\w.+-]+\.so[\w.+-]*", Path("/etc/ld.so.cache").read_bytes())
    except OSError:
        cached = []
    return frozenset([*(name.decode() for name in cached), *_libraries_in_folders(), *_mapped_libraries()])


def _mapped_libraries() -> Iterator[str]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    paths = {line.split(maxsplit=5)[5] for line in lines if ".so" in line}
    yield from map(os.path.basename, paths)


def _libraries_in_folders() -> Iterator[str]:
    folders = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    multiarch = f"{platform.machine()}-linux-gnu"
    for root in ("/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib", f"{sys.prefix}/lib"):
        folders += [root, f"{root}/{multiarch}"]
    torch = importlib.util.find_spec("torch")  # without importing it
    if torch is not None and torch.origin:
        package = Path(torch.origin).parent
        folders += map(str, [package / "lib", *package.parent.glob("nvidia/*/lib")])
    for folder in folders:
        try:
            yield from (name for name in os.listdir(folder) if ".so" in name)
        except OSError:
            continue


def _cuda_capability() -> Version:
    """(major, minor) of the first CUDA device, from the driver; () without driver or device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return ()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    for number, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return ()
    return (major.value, minor.value)


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return frozenset()
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def _full_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _installed(package: str) -> str:
    return _full_version(package).partition("+")[0]


def cpu_model() -> str:
    """The CPU's model name from /proc/cpuinfo; "" if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
