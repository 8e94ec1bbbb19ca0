"""Values as C++ literals."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from actserve.core.signature import Array
from actserve.store.artifact import FileRecord

_KEYWORDS = (
    "alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t class compl const "
    "const_cast constexpr continue decltype default delete do double dynamic_cast else enum explicit export extern "
    "false float for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or "
    "or_eq private protected public register reinterpret_cast return short signed sizeof static static_assert "
    "static_cast struct switch template this thread_local throw true try typedef typeid typename union unsigned using "
    "virtual void volatile wchar_t while xor xor_eq"
)
_TAKEN = (  # by the generated structs, their types, and macros
    *("pointers", "assign", "values", "source", "std", "float16", "bfloat16"),
    *("linux", "unix", "NULL", "EOF", "NAN", "INFINITY"),
)


def identifiers(names: Iterable[str]) -> list[str]:
    """A C++ identifier for each name, all different."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
        if not plain or plain[0].isdigit():
            plain = f"n{plain}"
        if plain in {*_KEYWORDS.split(), *_TAKEN}:
            plain += "_"
        unique, count = plain, 2
        while unique in found:
            unique, count = f"{plain}_{count}", count + 1
        found.append(unique)
    return found


def text(value: str) -> str:
    """A string literal, UTF-8."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}" for byte in value.encode())
    return f'"{"".join(plain)}"'


def number(value: float) -> str:
    """A double."""
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}std::numeric_limits<double>::infinity()"
    return repr(float(value))


def single(value: Any) -> str:
    """A float, of a numpy float32."""
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}std::numeric_limits<float>::infinity()"
    return f"{float(value).hex()}f"


def array(kind: str, name: str, values: Sequence[str]) -> str:
    """The definition of a std::array; it may be empty."""
    inside = "".join(f"    {value},\n" for value in values)
    initial = f"{{{{\n{inside}}}}}" if values else "{}"
    return f"inline constexpr std::array<{kind}, {len(values)}> {name} = {initial};\n"


def contents(array: Array) -> str:
    """The little-endian bytes of an array; zeros are left out."""
    data = array.tobytes()
    return ", ".join(map(str, data)) if any(data) else ""


def file(path: str, record: FileRecord) -> str:
    """A File."""
    return f"{{{text(path)}, {text(record.sha256)}, {record.bytes}}}"
