"""application/octet-stream: one tensor's bytes, row-major, little-endian; k items back to back are a batch of k.

The tensor is the policy's single observation, or the one requested output. There is no room for metadata.
"""

from __future__ import annotations

from collections.abc import Sequence

from actserve.core.errors import InvalidTensor, UnsupportedContentType
from actserve.core.signature import TensorSpec
from actserve.wire.payload import JSON, RAW, SAFETENSORS, Body, Payload, array_from_bytes


def read(body: Body, specs: Sequence[TensorSpec]) -> Payload:
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise UnsupportedContentType(f"{RAW}, which carries one tensor, for {names}", [JSON, SAFETENSORS])
    spec = specs[0]
    count, rest = divmod(len(body), spec.item_bytes)
    if count == 0 or rest:
        raise InvalidTensor(
            spec.name, f"{spec.item_bytes:,} bytes for one item ({spec}), or a multiple", f"{len(body):,} bytes"
        )
    return Payload({spec.name: array_from_bytes(body, spec, (count, *spec.shape))}, batched=count > 1)


def write(payload: Payload) -> bytes:
    (array,) = payload.tensors.values()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
