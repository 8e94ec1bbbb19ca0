"""application/x-npy: one tensor as NumPy's `np.save` writes it, with its dtype and shape. Without metadata."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actserve.core.errors import InvalidTensor
from actserve.core.signature import TensorSpec
from actserve.wire.npy_header import read_header
from actserve.wire.payload import NPY, Body, Payload, array_from_bytes, build_payload, check_shape, single_spec


def read(body: Body, specs: Sequence[TensorSpec]) -> Payload:
    spec = single_spec(specs, NPY)
    header = read_header(body)
    swapped = header.descr.startswith(">")
    if header.descr.lstrip("<>|=") != spec.numpy_dtype.str[1:]:
        raise InvalidTensor(spec.name, f"dtype {spec.dtype!r}", header.descr)
    check_shape(header.shape, spec)
    data, size = memoryview(body)[header.size :], spec.numpy_dtype.itemsize * header.elements
    if len(data) != size:
        raise InvalidTensor(spec.name, f"{size:,} bytes for shape {header.shape}"[:200], f"{len(data):,} bytes")
    stored = header.shape[::-1] if header.is_fortran else header.shape
    if swapped or spec.dtype == "bfloat16":  # which NumPy lacks: float32 is rounded to it
        values = np.frombuffer(data, spec.numpy_dtype.newbyteorder(">" if swapped else "<")).astype(spec.numpy_dtype)
        array = spec.from_wire(spec.to_wire(values)).reshape(stored)
    else:
        array = array_from_bytes(data, spec, stored)
    shaped = np.require(array.T if header.is_fortran else array, requirements=["C", "A"])
    return build_payload({spec.name: shaped}, specs, {})
