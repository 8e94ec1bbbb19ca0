"""Large JSON is read in pieces, with the same result as in one call."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pydantic_core
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actserve.core.errors import InvalidRequest
from actserve.core.signature import TensorSpec
from actserve.wire import as_json, large_json

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=6), inner, max_size=5),
    max_leaves=60,
)
SPACES = {"none": (",", ":"), "some": (" ,\n ", " :\t")}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_json, "PIECE_BYTES", 8)
    monkeypatch.setattr(large_json, "PIECE_VALUES", 4)


def outcome(read: Any, text: bytes) -> Any:
    try:
        return read(text)
    except ValueError:
        return ValueError


def in_one_call(text: bytes) -> Any:
    return pydantic_core.from_json(text, allow_inf_nan=False)


def same(left: Any, right: Any) -> bool:
    return repr(left) == repr(right)  # 1, 1.0 and True differ


@pytest.mark.parametrize("spaces", SPACES)
@given(document=DOCUMENTS, ascii_only=st.booleans())
def test_any_document_is_read_as_in_one_call(document: Any, ascii_only: bool, spaces: str) -> None:
    text = json.dumps(document, separators=SPACES[spaces], ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert same(outcome(large_json.load, text), outcome(in_one_call, text))


@given(
    document=DOCUMENTS,
    at=st.floats(0, 1),
    change=st.sampled_from([b"", b",", b"[", b"]", b"}", b'"', b"\\", b"1", b"x"]),
)
def test_any_damage_is_refused_or_read_as_in_one_call(document: Any, at: float, change: bytes) -> None:
    text = json.dumps(document).encode("utf-8", "surrogatepass")
    cut = int(at * len(text))
    for damaged in (text[:cut] + change + text[cut:], text[:cut] + change + text[cut + 1 :], text[:cut]):
        assert same(outcome(large_json.load, damaged), outcome(in_one_call, damaged)), damaged


@given(shape=st.lists(st.integers(0, 7), max_size=4), whole=st.booleans())
def test_an_array_is_written_as_in_one_call_and_read_again(shape: list[int], whole: bool) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(-9, 9, shape) if whole else rng.normal(size=shape)
    if array.size and not whole:
        array.flat[0] = np.inf
    text = large_json.dump(np.asarray(array))
    assert text == pydantic_core.to_json(np.asarray(array).tolist(), inf_nan_mode="strings")
    spec = TensorSpec("x", "int64" if whole else "float64", tuple(shape))
    if 0 not in shape:
        read = as_json.array_from_lists(large_json.load(text), spec)
        np.testing.assert_array_equal(read, array)


def test_lists_of_unequal_length_are_refused_in_pieces_too() -> None:
    spec = TensorSpec("x", "float32", (3,))
    for rows in ([[1, 2, 3]] * 9 + [[1, 2]], [[1, 2, 3]] * 9 + [1], [[1, 2, True]] * 9, [[1] * 20, [2] * 19]):
        with pytest.raises(InvalidRequest):
            as_json.array_from_lists(rows, spec)
