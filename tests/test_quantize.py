from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from actserve.core.errors import CaptureFailed, Disagreement
from actserve.core.signature import Array, Arrays
from actserve_export.capture import TracedPolicy, capture
from actserve_export.certify.narrow import Run, certify_narrow
from actserve_export.programs.onnx import convert_program
from actserve_export.programs.quantize import compensate
from actserve_export.programs.quantize import quantize as quantization
from actserve_export.programs.quantize.quantize import AGREEMENT, quantize
from actserve_export.programs.rewrites.optimize import optimize
from actserve_export.training import bundled
from tests.policies import cart

SCREENS = 384
FEW = 0.98  # what agreement can be asked for on a hundred screens; the full claim is in tests/benchmarks/programs.py


def runner(file: Path) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda batch: dict(zip(names, session.run(names, batch), strict=True))


@pytest.fixture(scope="module")
def screens() -> Array:
    source = bundled.policy("pong")
    assert source.observe is not None
    pixels: Array = source.observe(SCREENS)["pixels"].numpy()
    return pixels


@pytest.fixture(scope="module")
def captured() -> TracedPolicy:
    found = capture(bundled.policy("pong"))
    return replace(found, program=optimize(found.program)[0])


@pytest.fixture(scope="module")
def folder(captured: TracedPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    convert_program(captured.program, captured.signature, folder / "policy.onnx")
    return folder


@pytest.mark.parametrize("full_range", [True, False])
def test_int8_does_what_the_policy_does(
    captured: TracedPolicy, folder: Path, screens: Array, full_range: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "AGREEMENT", FEW)
    target = folder / "int8.onnx"
    program, done = next(quantize(folder / "policy.onnx", {"pixels": screens[::2]}, full_range=full_range))
    target.write_bytes(program)
    assert done["int8_layers"]
    assert done["float_layers"]
    assert done["calibration_samples"] == SCREENS // 2
    assert done["calibration_agreement"] >= FEW
    assert target.stat().st_size < 0.5 * (folder / "policy.onnx").stat().st_size
    assert onnx.load(str(target)).graph.input[0].type.tensor_type.shape.dim[0].dim_param
    certificate, results = certify_narrow(
        "int8",
        captured.signature,
        runner(target),
        runner(folder / "policy.onnx"),
        {"pixels": screens[1::2]},
        FEW,
        lambda run: [float(run({"pixels": screens[:1]})["action"][0])],
    )
    assert certificate["samples"] == SCREENS // 2
    assert list(results) == certificate["batch_sizes"] == [1, 8, 32]
    assert certificate["agreement"] >= FEW
    assert certificate["scores"]["int8"] == certificate["scores"]["original"]


def test_a_program_that_disagrees_gets_no_certificate(captured: TracedPolicy, folder: Path, screens: Array) -> None:
    original = runner(folder / "policy.onnx")

    def wrong(batch: Arrays) -> Arrays:
        outputs = original(batch)
        return outputs | {"action": (outputs["action"] + 1) % 6}

    with pytest.raises(Disagreement, match=r"0\.00% of the actions"):
        certify_narrow("int8", captured.signature, wrong, original, {"pixels": screens[:16]}, AGREEMENT)


def test_the_next_one_has_more_in_floats(folder: Path, screens: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "AGREEMENT", 0.0)
    versions = [made["int8_layers"] for _, made in quantize(folder / "policy.onnx", {"pixels": screens[:16]})]
    assert [len(layers) for layers in versions] == [3, 2, 1]


def test_none_agrees(folder: Path, screens: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "AGREEMENT", 1.01)
    with pytest.raises(CaptureFailed, match=r"at best .* of the actions agree"):
        list(quantize(folder / "policy.onnx", {"pixels": screens[:16]}))


def test_what_is_off_on_average_is_made_good(folder: Path, screens: Array, tmp_path: Path) -> None:
    original, calibration, held_out = folder / "policy.onnx", {"pixels": screens[::2]}, {"pixels": screens[1::2]}
    draft, layers = tmp_path / "int8.onnx", quantization._layers(original)
    quantization._quantize(original, draft, layers[1:-1], calibration, True)

    def off() -> float:
        values = [runner(file)(held_out)["action_value"] for file in (draft, original)]
        return float(np.abs(values[0] - values[1]).mean())

    before = off()
    compensate.correct_biases(original, draft, layers[1:-1], calibration)
    corrected = off()
    compensate.refit_last_layer(original, draft, layers[-1], calibration)
    assert off() < corrected < before


def test_too_small_to_quantise(tmp_path: Path) -> None:
    captured = capture(cart())
    convert_program(captured.program, captured.signature, tmp_path / "policy.onnx")
    with pytest.raises(CaptureFailed, match="expected 3 layers or more, got 2"):
        next(quantize(tmp_path / "policy.onnx", {"observation": np.zeros((8, 4), np.float32)}))
