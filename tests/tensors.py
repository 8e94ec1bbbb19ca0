"""Signatures, arrays and request items for property tests."""

from __future__ import annotations

from typing import get_args

import numpy as np
from hypothesis import strategies as st

from actserve.core.signature import IS_INIT, Arrays, DType, Parameter, Signature, State, TensorSpec
from actserve.wire import Payload

ACTION = TensorSpec("action", "int64", ())
NAMES = ["pixels", "x", "größe", "a.b", "__meta__"]
SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)
SESSIONS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=200)


def specs(names: list[str], count: int = 4) -> st.SearchStrategy[list[TensorSpec]]:
    """1 to `count` specs, 0-d and booleans among them."""
    spec = st.builds(TensorSpec, st.sampled_from(names), st.sampled_from(get_args(DType)), SHAPES)
    return st.lists(spec, min_size=1, max_size=count, unique_by=lambda spec: spec.name)


@st.composite
def signatures(draw: st.DrawFn) -> Signature:
    states = draw(st.just([]) | specs(["h", "c"]))
    return Signature(
        tuple(draw(specs(NAMES))),
        (ACTION,),
        max_batch=8,
        state=tuple(State(spec, f"{spec.name}_next") for spec in states),
        is_init=draw(st.booleans()),
        parameters=draw(st.sampled_from([(), (Parameter("epsilon", 0.25, 0.0, 1.0),)])),
    )


def values(wanted: tuple[TensorSpec, ...] | list[TensorSpec], size: int, seed: int) -> Arrays:
    """{name: (size, *shape)} of random numbers."""
    rng = np.random.default_rng(seed)
    return {spec.name: spec.sample(rng, size) for spec in wanted}


@st.composite
def requests(draw: st.DrawFn, signature: Signature) -> Payload:
    """The inputs that a client may send to a policy: all observations, and some of the others."""
    states = [state.spec for state in signature.state] if draw(st.booleans()) else []
    others = [spec for spec in signature.request_inputs if spec is IS_INIT or spec.name == "epsilon"]
    others = draw(st.lists(st.sampled_from(others), unique=True)) if others else []
    size = draw(st.integers(1, 3))
    return Payload(
        values([*signature.observations, *states, *others], size, draw(st.integers(0, 2**32))),
        batched=size > 1 or draw(st.booleans()),
        exploration=draw(st.sampled_from([None, "deterministic", "random"])),
        seed=draw(st.none() | st.integers(0, 2**63 - 1)),
        session=draw(st.none() | SESSIONS),
    )


def assert_same(got: Payload, expected: Payload) -> None:
    """Equal to the last bit, dtypes and shapes too."""
    assert (got.batched, got.metadata) == (expected.batched, expected.metadata)
    assert got.tensors.keys() == expected.tensors.keys()
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(got.tensors[name], array, strict=True)
