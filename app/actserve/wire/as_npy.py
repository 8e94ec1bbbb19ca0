"""application/x-npy: one tensor as NumPy's `np.save` writes it, with its dtype and shape. Without metadata."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np

from actserve.core.errors import InvalidTensor, MalformedBody
from actserve.core.signature import TensorSpec
from actserve.wire.payload import NPY, Body, Payload, array_from_bytes, build_payload, check_shape, single_spec

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 4096
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read(body: Body, specs: Sequence[TensorSpec]) -> Payload:
    spec = single_spec(specs, NPY)
    file = io.BytesIO(bytes(body[: MAX_HEADER_BYTES + 16]))
    try:
        shape, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file, max_header_size=MAX_HEADER_BYTES)
    except (ValueError, KeyError) as error:
        raise MalformedBody(f"expected a .npy file of version 1 or 2; got something else: {error}"[:300]) from None
    if dtype.newbyteorder("=") != spec.numpy_dtype:
        raise InvalidTensor(spec.name, f"dtype {spec.dtype!r}", f"{dtype}"[:80])
    check_shape(shape, spec)
    data, size = memoryview(body)[file.tell() :], spec.numpy_dtype.itemsize * math.prod(shape)
    if len(data) != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes for shape {shape}"[:200], f"{len(data):,} bytes")
    stored = shape[::-1] if is_fortran else shape
    if dtype.byteorder == ">" or spec.dtype == "bfloat16":  # which NumPy lacks: float32 is rounded to it
        array = spec.from_wire(spec.to_wire(np.frombuffer(data, dtype).astype(spec.numpy_dtype))).reshape(stored)
    else:
        array = array_from_bytes(data, spec, stored)
    return build_payload({spec.name: np.require(array.T if is_fortran else array, requirements=["C", "A"])}, specs, {})
