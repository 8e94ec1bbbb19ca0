"""The header of a .npy file (NumPy Enhancement Proposal 1). It is matched, not evaluated as NumPy does."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from actserve.core.errors import MalformedBody
from actserve.wire.payload import Body

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 4096
_LENGTH_BYTES = {b"\x01\x00": 2, b"\x02\x00": 4}  # by version
_FIELDS = re.compile(
    r"""\s*(?:
        (?P<q1>['"])descr(?P=q1)\s*:\s*(?P<q2>['"])(?P<descr>[<>|=]?[A-Za-z][0-9]{0,4})(?P=q2)
      | (?P<q3>['"])fortran_order(?P=q3)\s*:\s*(?P<order>True|False)
      | (?P<q4>['"])shape(?P=q4)\s*:\s*\((?P<shape>(?:\s*[0-9]{1,15}\s*,)*\s*(?:[0-9]{1,15}\s*)?)\)
    )\s*(?:,|$)""",
    re.VERBOSE,
)


class NpyHeader(NamedTuple):
    descr: str  # the dtype, as NumPy writes it: "<f4"
    is_fortran: bool  # column-major
    shape: tuple[int, ...]
    size: int  # bytes of the file before the data

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(body: Body) -> NpyHeader:
    """Raises `MalformedBody` for everything but a plain array in a file of version 1 or 2."""
    start = bytes(body[: MAX_HEADER_BYTES + 16])
    length_bytes = _LENGTH_BYTES.get(start[6:8], 0)
    begin = 8 + length_bytes
    end = begin + int.from_bytes(start[8:begin], "little")
    if not start.startswith(MAGIC) or not length_bytes or end > len(start):
        raise _malformed("another beginning")
    text = start[begin:end].decode("latin-1").strip()
    fields = _match(text)
    if fields.keys() != {"descr", "order", "shape"}:
        raise _malformed(text[:200])
    shape = tuple(int(length) for length in fields["shape"].split(",") if length.strip())
    return NpyHeader(fields["descr"], fields["order"] == "True", shape, end)


def _match(text: str) -> dict[str, str]:
    """The fields of `{'descr': …, 'fortran_order': …, 'shape': …, }`; fewer if it is something else."""
    found: dict[str, str] = {}
    if not (text.startswith("{") and text.endswith("}")):
        return found
    inner = text[1:-1].strip()
    at = 0
    while at < len(inner):
        match = _FIELDS.match(inner, at)
        if match is None:
            return {}
        found |= {name: match[name] for name in ("descr", "order", "shape") if match[name] is not None}
        at = match.end()
    return found


def _malformed(got: str) -> MalformedBody:
    return MalformedBody(f"expected a .npy file of version 1 or 2 with a plain array; got {got!r}"[:300])
