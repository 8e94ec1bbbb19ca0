"""The header of a .npy file: as NumPy and others write it, and what is none."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from actserve import wire
from actserve.core.errors import MalformedBody
from actserve.core.signature import Array, Signature, TensorSpec
from actserve.wire.npy_header import read_header

STATE = TensorSpec("state", "float32", (3,))
SIGNATURE = Signature((STATE,), (STATE,), 4)


def saved(array: Array, version: Any = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def file_with(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(12)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "|u1", "<i8", "|b1", "<f2"])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 3, 4)])
def test_a_header_says_what_numpy_saved(shape: tuple[int, ...], dtype: str, version: Any) -> None:
    for array in (np.zeros(shape, dtype), np.zeros(shape, dtype, order="F")):
        file = saved(array, version)
        header = read_header(file)
        is_fortran = not array.flags.c_contiguous
        assert (header.descr, header.is_fortran, header.shape) == (dtype, is_fortran, shape)
        assert file[header.size :] == array.tobytes("A")


@pytest.mark.parametrize(
    "header",
    [
        '{"descr": "<f4", "fortran_order": False, "shape": (3,)}',
        "{'shape':(3,),'descr':'<f4','fortran_order':False}",
        "  {'descr': '<f4', 'fortran_order': False, 'shape': (3, ), }   ",
    ],
)
def test_other_writers_order_and_space_it_otherwise(header: str) -> None:
    assert read_header(file_with(header))[:3] == ("<f4", False, (3,))
    assert wire.decode(wire.NPY, bytearray(file_with(header)), SIGNATURE).tensors["state"].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x03\x00\x00\x00\x00\x00",
        b"\x93NUMPY\x01\x00\xff\xff{'descr'",
        file_with("{'descr': '|O', 'fortran_order': False, 'shape': (3, }"),
        file_with("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }"),
        file_with("{'descr': '<f4', 'fortran_order': False}"),
        file_with("{'descr': '<f4', 'fortran_order': 0, 'shape': (3,), }"),
        file_with("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }"),
        file_with("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'more': 1}"),
        file_with("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), } + print()"),
        file_with("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 3000),
        file_with("{'descr': '<f4', 'fortran_order': False, 'shape': (8, 8, 3]"),
    ],
)
def test_everything_else_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody, match=r"expected a \.npy file of version 1 or 2 with a plain array"):
        read_header(body)
