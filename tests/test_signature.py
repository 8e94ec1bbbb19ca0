from __future__ import annotations

from typing import get_args

import ml_dtypes
import numpy as np
import pytest

from actserve.core.errors import InvalidTensor, UnknownOutput
from actserve.core.signature import Array, DType, Signature, TensorSpec

PIXELS = TensorSpec("pixels", "uint8", (4, 3))
SPEED = TensorSpec("speed", "float32", (), low=-1.0, high=1.0)
SIGNATURE = Signature(
    observations=(PIXELS, SPEED),
    outputs=(TensorSpec("action", "int64", ()), TensorSpec("action_value", "float32", (6,))),
    max_batch=8,
)


def good(batch: int = 2) -> dict[str, Array]:
    return {"pixels": PIXELS.zeros(batch), "speed": SPEED.zeros(batch)}


def test_a_good_batch_gives_its_size() -> None:
    assert SIGNATURE.validate(good(5)) == 5


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("pixels", np.zeros((2, 4, 3), np.int64), r"pixels: expected uint8\[B, 4, 3\]; got int64\[2, 4, 3\]"),
        ("pixels", np.zeros((2, 3, 4), np.uint8), r"expected uint8\[B, 4, 3\]; got uint8\[2, 3, 4\]"),
        ("pixels", np.zeros((4, 3), np.uint8), r"got uint8\[4, 3\]"),
        ("pixels", np.zeros((2, 3, 4), np.uint8).transpose(0, 2, 1), "row-major"),
        ("pixels", np.zeros((0, 4, 3), np.uint8), "same number of items"),
        ("speed", np.array([0.0, np.nan], np.float32), "expected numbers; got NaN"),
        ("speed", np.array([0.0, 2.0], np.float32), "at most 1; got 2"),
        ("speed", np.array([0.0, -2.0], np.float32), "at least -1; got -2"),
        ("speed", np.zeros(3, np.float32), "same number of items"),
        ("other", np.zeros(2, np.float32), "one of the inputs pixels, speed"),
    ],
)
def test_a_bad_array_is_refused_with_what_was_expected(name: str, array: Array, message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        SIGNATURE.validate(good() | {name: array})


def test_a_missing_input_and_an_empty_batch_are_refused() -> None:
    with pytest.raises(InvalidTensor, match=r"speed: expected float32.*; got nothing"):
        SIGNATURE.validate({"pixels": PIXELS.zeros(2)})
    with pytest.raises(InvalidTensor, match="at least one item"):
        SIGNATURE.validate(good(0))


@pytest.mark.parametrize("dtype", get_args(DType))
@pytest.mark.parametrize("bounds", [(None, None), (0.0, 1.0)])
def test_samples_are_valid_and_vary(dtype: DType, bounds: tuple[float | None, float | None]) -> None:
    spec = TensorSpec("x", dtype, (5, 2), *bounds)
    batch = spec.sample(np.random.default_rng(0), 7)
    spec.validate(batch)
    assert batch.shape == (7, 5, 2)
    assert len(np.unique(batch)) > 1
    spec.validate(spec.zeros(3))


def test_outputs_are_selected_by_name() -> None:
    assert SIGNATURE.select([]) == ("action",)
    assert SIGNATURE.select(["action_value", "action"]) == ("action_value", "action")
    with pytest.raises(UnknownOutput, match="gives action, action_value"):
        SIGNATURE.select(["nope"])


def test_bytes_of_an_item() -> None:
    assert PIXELS.item_bytes == 12
    assert SPEED.item_bytes == 4
    assert TensorSpec("x", "bfloat16", (3,)).item_bytes == 6


def test_bfloat16_is_float32_in_memory_and_two_bytes_in_a_body() -> None:
    spec = TensorSpec("x", "bfloat16", ())
    values = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32).view(np.float32)
    values = np.concatenate([values, np.array([0, -0.0, np.inf, np.nan, 1.00390625, 3.4e38, 1e-40], np.float32)])
    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    halves = spec.to_wire(values)
    assert halves.dtype == np.dtype("<u2")
    back = spec.from_wire(halves)
    np.testing.assert_array_equal(back, expected.astype(np.float32), strict=True)
    assert (np.signbit(back) == np.signbit(values))[~np.isnan(values)].all()
    np.testing.assert_array_equal(spec.to_wire(back), halves, strict=True)
    assert (spec.limits[1], spec.to_wire(np.array([spec.limits[1]], np.float32))[0]) == (3.3895313892515355e38, 0x7F7F)
