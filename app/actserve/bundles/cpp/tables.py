"""ziggurat.h: the tables of numpy's normal and exponential generators."""

from __future__ import annotations

import numpy as np

from actserve.bundles import ziggurat
from actserve.bundles.cpp import literals

_BEGIN = (
    "// The layers of the ziggurats from which numpy draws normal and exponential numbers. actserve wrote this file.\n"
    "#pragma once\n\n#include <cstdint>\n\nnamespace actserve {\n\n"
    "struct Ziggurat {\n  std::uint32_t inside[256];\n  float width[256], density[256];\n  float tail;\n};\n\n"
)


def header() -> str:
    """The content of ziggurat.h."""
    tables = {"normal_ziggurat": ziggurat.normal(), "exponential_ziggurat": ziggurat.exponential()}
    lines = [_BEGIN]
    for name, table in tables.items():
        lines.append(
            f"inline constexpr Ziggurat {name} = {{\n    {{{', '.join(f'{each}u' for each in table.inside)}}},\n"
        )
        for values in (table.width, table.density):
            lines.append(f"    {{{', '.join(map(literals.single, values))}}},\n")
        lines.append(f"    {literals.single(np.float32(table.tail))}}};\n\n")
    return "".join([*lines, "}  // namespace actserve\n"])
