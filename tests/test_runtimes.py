from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from actserve.core.errors import CorruptFile, RuntimeFailure
from actserve.core.signature import Array, Signature, TensorSpec
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.load import RUNTIMES, load
from actserve.store.artifact import Artifact, Program
from actserve.store.local import ModelStore
from tests.contracts import RuntimeContract


class TestOnnxRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self, cart: Artifact) -> Runtime:
        return load("onnx", cart)


class TestAotiRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self, cart: Artifact) -> Runtime:
        return load("pt2", cart)


class Unrounded(Runtime):
    """A compiled program that leaves out a rounding to bfloat16."""

    @classmethod
    def load(cls, artifact: Artifact, threads: int, shared: Path | None = None) -> Unrounded:
        raise NotImplementedError

    def _run(self, arrays: list[Array]) -> list[Array]:
        return [arrays[0] / 3]

    def close(self) -> None: ...


def test_results_of_bfloat16_are_bfloat16() -> None:
    spec = TensorSpec("x", "bfloat16", (2,))
    runtime = Unrounded(Signature((spec,), (dataclasses.replace(spec, name="action"),), 8))
    action = runtime.run({"x": np.ones((1, 2), np.float32)})["action"]
    assert action.tolist() == [[0.333984375, 0.333984375]]


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_changed_program_is_not_opened(own_store: ModelStore, name: str) -> None:
    artifact = own_store.resolve("cart")
    file = artifact.folder / artifact.manifest.programs[name].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptFile, match="is not what was published"):
        load(name, artifact)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_file_that_is_no_program_is_refused(cart: Artifact, tmp_path: Path, name: str) -> None:
    (tmp_path / "program").write_bytes(b"not a program")
    draft = dataclasses.replace(cart.manifest, programs={name: Program("program")})
    artifact = ModelStore(tmp_path / "store").publish(draft, {"program": tmp_path / "program"})
    with pytest.raises(RuntimeFailure, match="refused the"):
        load(name, artifact)


def test_a_program_that_is_not_the_signature_is_refused(cart: Artifact) -> None:
    signature = dataclasses.replace(cart.manifest.signature, observations=(TensorSpec("observation", "float32", (5,)),))
    forged = Artifact(cart.folder, dataclasses.replace(cart.manifest, signature=signature))
    with pytest.raises(RuntimeFailure, match="the manifest says"):
        load("onnx", forged)
