"""The requirements of a shared library on its host, from its ELF headers."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

_VERSION = re.compile(r"(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)*)")


@dataclass(frozen=True)
class ElfRequirements:
    """`libraries` are the DT_NEEDED entries. `versions` has the newest symbol version by name, such as ``"3.4.30"``."""

    libraries: tuple[str, ...]
    versions: dict[str, str]


def read_requirements(library: bytes) -> ElfRequirements:
    """Raises `elftools.common.exceptions.ELFError` if `library` is not an ELF file."""
    libraries: list[str] = []
    found: dict[str, tuple[int, ...]] = {}
    for section in ELFFile(io.BytesIO(library)).iter_sections():
        if isinstance(section, DynamicSection):
            tags: Iterable[Any] = section.iter_tags("DT_NEEDED")
            libraries += [tag.needed for tag in tags]
        if isinstance(section, GNUVerNeedSection):
            for _, versions in section.iter_versions():
                for version in versions:
                    if match := _VERSION.fullmatch(version.name):
                        numbers = tuple(map(int, match[2].split(".")))
                        found[match[1]] = max(found.get(match[1], ()), numbers)
    return ElfRequirements(tuple(libraries), {name: ".".join(map(str, numbers)) for name, numbers in found.items()})
