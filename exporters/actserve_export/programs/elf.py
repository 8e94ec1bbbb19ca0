"""What a shared library asks of the host that loads it, read from its ELF headers."""

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
class Needs:
    """`libraries` are the DT_NEEDED entries; `versions` the newest symbol version by name, as ``"3.4.30"``."""

    libraries: tuple[str, ...]
    versions: dict[str, str]


def read_needs(library: bytes) -> Needs:
    """Raises `elftools.common.exceptions.ELFError` for what is no ELF file."""
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
    return Needs(tuple(libraries), {name: ".".join(map(str, numbers)) for name, numbers in found.items()})
