from __future__ import annotations

import numpy as np
import pytest

from actserve.core.completion import MAX_SEED, complete, draw_noise, step_seed
from actserve.core.errors import InvalidRequest, InvalidTensor
from actserve.core.signature import Distribution, Noise, Parameter, Signature, State, TensorSpec

X = TensorSpec("x", "float32", (2,))
NOISES: tuple[Noise, ...] = tuple(
    Noise(TensorSpec(name, "float32", (3,)), name) for name in ("uniform", "normal", "gumbel", "exponential")
)
SIGNATURE = Signature(
    observations=(X,),
    outputs=(TensorSpec("action", "int64", ()),),
    max_batch=8,
    state=(State(TensorSpec("h", "float32", (2,)), "next_h", 0.5),),
    is_init=True,
    exploration=("deterministic", "random"),
    parameters=(Parameter("epsilon", 0.25, 0.0, 1.0),),
    noise=NOISES,
)


def test_what_is_left_out_is_filled_in() -> None:
    completed = complete(SIGNATURE, {"x": X.zeros(3)}, 3)
    SIGNATURE.validate(completed.inputs)
    assert completed.seed is None
    assert (completed.inputs["h"] == 0.5).all()
    assert completed.inputs["is_init"].all(), "without state, an episode begins"
    assert (completed.inputs["epsilon"] == 0.25).all()
    assert not completed.inputs["explore"].any()


def test_what_is_given_is_kept() -> None:
    given = {"x": X.zeros(1), "h": np.ones((1, 2), np.float32), "epsilon": np.array([0.5], np.float32)}
    inputs = complete(SIGNATURE, given, 1, "random", 7).inputs
    assert (inputs["h"] == 1).all()
    assert not inputs["is_init"].any(), "with state, an episode goes on"
    assert inputs["epsilon"] == 0.5
    assert inputs["explore"].all()


def test_a_request_carries_all_of_the_state_or_none() -> None:
    two = Signature(
        (X,), SIGNATURE.outputs, 8, state=(*SIGNATURE.state, State(TensorSpec("c", "float32", ()), "next_c"))
    )
    assert two.validate_request({"x": X.zeros(1)}) == 1
    with pytest.raises(InvalidTensor, match=r"c: expected float32.*; got nothing"):
        two.validate_request({"x": X.zeros(1), "h": np.zeros((1, 2), np.float32)})
    with pytest.raises(InvalidTensor, match="one of the inputs x, h, c"):
        two.validate_request({"x": X.zeros(1), "noise": X.zeros(1)})


def test_the_same_seed_gives_an_item_the_same_noise_in_any_batch() -> None:
    alone, crowd = draw_noise(NOISES, 7, 1), draw_noise(NOISES, 7, 5)
    for name in alone:
        np.testing.assert_array_equal(alone[name][0], crowd[name][0])
        assert len(np.unique(crowd[name][:, 0])) == 5, "items differ"
    other = draw_noise(NOISES, 8, 1)
    assert not np.array_equal(alone["uniform"], other["uniform"])


def test_a_fresh_seed_is_told_and_repeats() -> None:
    first = complete(SIGNATURE, {"x": X.zeros(2)}, 2, "random")
    assert first.seed is not None
    again = complete(SIGNATURE, {"x": X.zeros(2)}, 2, "random", first.seed)
    for name, array in first.inputs.items():
        np.testing.assert_array_equal(array, again.inputs[name])
    assert complete(SIGNATURE, {"x": X.zeros(2)}, 2, "random").seed != first.seed


@pytest.mark.parametrize(
    ("distribution", "cdf"),
    [
        ("uniform", "uniform"),
        ("normal", "norm"),
        ("gumbel", "gumbel_r"),
        ("exponential", "expon"),
    ],
)
def test_noise_has_its_distribution(distribution: Distribution, cdf: str) -> None:
    from scipy import stats  # a second: only where this test runs

    values = draw_noise((Noise(TensorSpec("n", "float32", (4,)), distribution),), 1, 4096)["n"]
    assert np.isfinite(values).all()
    assert stats.kstest(values.ravel(), cdf).pvalue > 1e-4


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(InvalidRequest, match="expected a seed"):
        complete(SIGNATURE, {"x": X.zeros(1)}, 1, "random", seed)


def test_an_exploration_that_the_policy_has_not_is_refused() -> None:
    sure = Signature((X,), SIGNATURE.outputs, 8)
    with pytest.raises(InvalidRequest, match="expected an exploration of deterministic; got 'random'"):
        complete(sure, {"x": X.zeros(1)}, 1, "random")


def test_each_step_has_a_seed_of_its_own() -> None:
    seeds = {step_seed(seed, step) for seed in (0, 1, MAX_SEED) for step in range(1, 200)}
    assert len(seeds) == 3 * 199
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    assert step_seed(7, 1) == 8875243823434874480, "clients in other languages count on it"
