"""Aligns the weights that ONNX Runtime has written into a file beside an optimised model.

Its kernels for AVX-512 need addresses that are multiples of 64, and crash otherwise. It writes one tensor right after
the other, whatever their sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

from actserve.engine.runtimes.protobuf import changed, fields

ALIGNMENT = 64  # bytes
_ENTRIES = (7, 5, 13)  # ModelProto.graph, GraphProto.initializer, TensorProto.external_data
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
OFFSET, LENGTH, PREPACKED = "offset", "length", "prepacked_"


def align(model: Path, weights: Path) -> None:
    """Move every tensor of the file `weights` to a multiple of 64, and change their places in the file `model`.

    Raises `ValueError` if the model cannot be read, and OSError.
    """
    aligned = weights.with_suffix(".aligned")
    with open(weights, "rb") as source, open(aligned, "wb") as target:
        model.write_bytes(changed(model.read_bytes(), _ENTRIES[:-1], lambda tensor: _move(tensor, source, target)))
    aligned.replace(weights)


def external_data(tensor: bytes) -> dict[str, str]:
    """The entries of a TensorProto that say where its data is in another file; empty if it has none."""
    found = {}
    for number, span in fields(tensor, (0, len(tensor))):
        if number == _ENTRIES[-1] and isinstance(span, tuple):
            entry = {one: tensor[slice(*at)].decode() for one, at in fields(tensor, span) if isinstance(at, tuple)}
            found[entry[_KEY]] = entry[_VALUE]
    return found


def _move(tensor: bytes, source: IO[bytes], target: IO[bytes]) -> bytes:
    """Copy what a TensorProto has in the file; returns the TensorProto with the new places."""
    entries = external_data(tensor)
    if OFFSET not in entries:
        return tensor
    moved = {OFFSET: _copy(int(entries[OFFSET]), int(entries[LENGTH]), source, target)}
    for key, value in entries.items():
        if key.startswith(PREPACKED):  # the kernel, then the place of each of its buffers
            kernel, *buffers = value.split("|")
            moved[key] = "|".join([kernel, *(_copied(buffer, source, target) for buffer in buffers)])

    def replaced(entry: bytes) -> bytes:
        spans = {number: span for number, span in fields(entry, (0, len(entry))) if isinstance(span, tuple)}
        key = entry[slice(*spans[_KEY])].decode()
        return changed(entry, (_VALUE,), lambda value: moved.get(key, value.decode()).encode())

    return changed(tensor, _ENTRIES[-1:], replaced)


def _copied(buffer: str, source: IO[bytes], target: IO[bytes]) -> str:
    """Copy a buffer, "offset;length;checksum" -> its new place."""
    offset, length, *rest = buffer.split(";")
    return ";".join([_copy(int(offset), int(length), source, target), length, *rest])


def _copy(offset: int, length: int, source: IO[bytes], target: IO[bytes]) -> str:
    target.write(bytes(-target.tell() % ALIGNMENT))
    place = target.tell()
    source.seek(offset)
    data = source.read(length)
    if len(data) != length:
        raise ValueError(f"expected {length:,} bytes at {offset:,}; got {len(data):,}")
    target.write(data)
    return str(place)
