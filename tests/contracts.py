"""The contract of a Runtime, for any engine. Subclass it and provide `runtime`."""

from __future__ import annotations

import numpy as np
import pytest

from actserve.core.errors import InvalidTensor, RuntimeFailure
from actserve.engine import golden
from actserve.engine.runtimes.base import Runtime
from actserve.store.artifact import Artifact


class RuntimeContract:
    @pytest.fixture
    def runtime(self, cart: Artifact) -> Runtime:
        raise NotImplementedError  # each subclass has its own fixture

    @pytest.mark.parametrize("size", [1, 3, 32])
    def test_it_repeats_the_golden_samples_at_any_batch_size(self, runtime: Runtime, cart: Artifact, size: int) -> None:
        inputs, reference = golden.read(cart)
        outputs = golden.in_batches(runtime.run, inputs, size)
        assert golden.compare(runtime.signature, outputs, reference, golden.Tolerance()).holds
        assert list(outputs) == ["action", "action_value"]

    def test_rows_do_not_depend_on_their_neighbours(self, runtime: Runtime, cart: Artifact) -> None:
        inputs, _ = golden.read(cart)
        alone = golden.in_batches(runtime.run, inputs, 1)
        together = runtime.run({name: array[::-1].copy() for name, array in inputs.items()})
        np.testing.assert_array_equal(alone["action"], together["action"][::-1])
        np.testing.assert_allclose(alone["action_value"], together["action_value"][::-1], atol=1e-5)

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((1, 4), np.float64),
            np.zeros((1, 5), np.float32),
            np.zeros(4, np.float32),
            np.zeros((1, 1, 4), np.float32),
            np.zeros((4, 2), np.float32).T,
            np.zeros((0, 4), np.float32),
            np.full((1, 4), np.nan, np.float32),
        ],
    )
    def test_a_wrong_array_never_reaches_the_program(self, runtime: Runtime, array: np.ndarray) -> None:
        with pytest.raises(InvalidTensor, match="observation: expected"):
            runtime.run({"observation": array})

    def test_missing_and_unknown_names_are_refused(self, runtime: Runtime) -> None:
        observation = np.zeros((1, 4), np.float32)
        with pytest.raises(InvalidTensor, match="nothing"):
            runtime.run({})
        with pytest.raises(InvalidTensor, match="an unknown name"):
            runtime.run({"observation": observation, "other": observation})

    def test_a_batch_beyond_the_signature_is_refused(self, runtime: Runtime) -> None:
        with pytest.raises(RuntimeFailure, match="at most 256 items"):
            runtime.run({"observation": np.zeros((257, 4), np.float32)})

    def test_outputs_are_not_overwritten_by_the_next_call(self, runtime: Runtime, cart: Artifact) -> None:
        inputs, _ = golden.read(cart)
        first = runtime.run(inputs)
        kept = {name: array.copy() for name, array in first.items()}
        runtime.run({"observation": inputs["observation"] * -3})
        for name, array in kept.items():
            np.testing.assert_array_equal(first[name], array)
