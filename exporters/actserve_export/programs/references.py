"""Tensors that are stored as references into another file of the same artifact.

An artifact's `.onnx` and its exported program hold the same weights. For each tensor whose bytes, little-endian and
row-major, occur in the other file, the program stores where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, get_args

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor

from actserve.core.errors import CaptureFailed

SMALLEST_BYTES = 1024  # a reference to a smaller tensor saves little
DTypeName = Literal[
    "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"
]  # fmt: skip

ReadFile = Callable[[str], bytes]  # the artifact's file of that name


@dataclass(frozen=True)
class Reference:
    """A tensor as `length` bytes of `file`, from `offset` on."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    file: str
    offset: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(ge=1)]
    dtype: DTypeName
    shape: list[Annotated[int, Field(ge=0)]]


def replace_by_references(
    tensors: Mapping[str, Tensor], files: Mapping[str, bytes]
) -> tuple[dict[str, Tensor], dict[str, Reference]]:
    """(the tensors to store, references to the tensors that `files` hold). `files` has contents by name."""
    references = {}
    for name, tensor in tensors.items():
        if (reference := _find(tensor, files)) is not None:
            references[name] = reference
    return {name: tensor for name, tensor in tensors.items() if name not in references}, references


def _find(tensor: Tensor, files: Mapping[str, bytes]) -> Reference | None:
    dtype: DTypeName | None = next((d for d in get_args(DTypeName) if tensor.dtype == getattr(torch, d)), None)
    if dtype is None or tensor.nbytes < SMALLEST_BYTES:
        return None
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    for file, content in files.items():
        if (offset := content.find(data)) >= 0:
            return Reference(file, offset, len(data), dtype, list(tensor.shape))
    return None


def to_json(references: Mapping[str, Reference]) -> str:
    return _references().dump_json(dict(references)).decode()


def read_references(text: str, read: ReadFile) -> dict[str, Tensor]:
    """The tensors that `to_json` wrote references to. `read` returns a file's verified bytes.

    Raises `CaptureFailed` for a wrong reference, ValueError for other text, and what `read` raises.
    """
    read_once = cache(read)
    return {name: _read(name, reference, read_once) for name, reference in _references().validate_json(text).items()}


def _read(name: str, reference: Reference, read: ReadFile) -> Tensor:
    content, end = read(reference.file), reference.offset + reference.length
    if end > len(content):
        raise CaptureFailed(
            f"{name}: the stored program refers to bytes {reference.offset:,} to {end:,} of {reference.file}, "
            f"which has {len(content):,}"
        )
    dtype: torch.dtype = getattr(torch, reference.dtype)
    if math.prod(reference.shape) * dtype.itemsize != reference.length:
        raise CaptureFailed(
            f"{name}: the stored program refers to {reference.length:,} bytes of {reference.file}, "
            f"which are no {reference.dtype}{reference.shape}"
        )
    return torch.frombuffer(bytearray(content[reference.offset : end]), dtype=dtype).reshape(reference.shape)


@cache
def _references() -> TypeAdapter[dict[str, Reference]]:
    return TypeAdapter(dict[str, Reference])
