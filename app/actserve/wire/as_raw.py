"""application/octet-stream: one tensor's bytes, row-major, little-endian; k items back to back are a batch of k.

The tensor is the policy's single observation, or the one requested output. There is no room for metadata. The bytes do
not say what they are: four float64 are as long as eight float32. So the content type can:
`application/octet-stream; dtype=float32`.
"""

from __future__ import annotations

from collections.abc import Sequence

from actserve.core.errors import InvalidTensor
from actserve.core.signature import TensorSpec
from actserve.wire.npy_header import MAGIC
from actserve.wire.payload import NPY, RAW, Body, Payload, array_from_bytes, find_spec, single_spec


def read(body: Body, specs: Sequence[TensorSpec]) -> Payload:
    spec = single_spec(specs, RAW)
    refuse_npy(body, spec)
    count, rest = divmod(len(body), spec.item_bytes)
    if count == 0 or rest:
        raise InvalidTensor(
            spec.name, f"{spec.item_bytes:,} bytes for one item ({spec}), or a multiple", f"{len(body):,} bytes"
        )
    return Payload({spec.name: array_from_bytes(body, spec, (count, *spec.shape))}, batched=count > 1)


def refuse_npy(body: Body, spec: TensorSpec) -> None:
    """Raises `InvalidTensor` for a .npy file, whose header is often as long as some items."""
    if body[: len(MAGIC)] == MAGIC:
        raise InvalidTensor(spec.name, f"the bytes of {spec} alone", f"a .npy file, which needs Content-Type: {NPY}")


def check_dtype(dtype: str | None, spec: TensorSpec) -> None:
    """Raises `InvalidTensor` for another `dtype` than the spec's; None: the client does not say."""
    if dtype not in (None, spec.dtype):
        raise InvalidTensor(spec.name, f"dtype {spec.dtype!r}", f"{dtype!r}"[:80])


def write(payload: Payload, specs: Sequence[TensorSpec]) -> bytes:
    ((name, array),) = payload.tensors.items()
    return find_spec(name, specs).to_wire(array).tobytes()
