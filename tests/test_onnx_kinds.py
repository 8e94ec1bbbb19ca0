"""Files as other exporters write them: functions, open axes, settings, batches elsewhere, outputs of no use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Arrays
from actserve.engine.runtimes.load import load
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve_export.publish import export
from actserve_export.sources.onnx_source import OnnxSource

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
WEIGHTS = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
BATCH = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
OBS, Q = helper.make_tensor_value_info("obs", FLOAT, ["n", 4]), helper.make_tensor_value_info("q", FLOAT, ["n", 3])
LINEAR = helper.make_node("MatMul", ["obs", "weights"], ["q"])


def model(nodes: Any, inputs: Any = (OBS,), outputs: Any = (Q,), domains: Any = (), **parts: Any) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "policy", inputs, outputs, [numpy_helper.from_array(WEIGHTS, "weights")])
    opsets = [helper.make_opsetid("", 18), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **parts)


def published(made: onnx.ModelProto, folder: Path, **options: Any) -> Artifact:
    onnx.save(made, folder / "x.onnx")
    return export(OnnxSource(folder / "x.onnx", **options), "x", ModelStore(folder / "store"), origin="x.onnx").artifact


def run(artifact: Artifact, inputs: Arrays) -> Arrays:
    runtime = load("onnx", artifact)
    found = runtime.run(inputs)
    runtime.close()
    return found


def test_functions_of_the_file_are_inlined(tmp_path: Path) -> None:
    inner = helper.make_function(
        "mine",
        "Layer",
        ["x", "w"],
        ["y"],
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [helper.make_opsetid("", 18)],
    )
    node = helper.make_node("Layer", ["obs", "weights"], ["q"], domain="mine")
    artifact = published(model([node], domains=["mine"], functions=[inner]), tmp_path)
    assert "mine" not in artifact.read("graph.txt").decode()
    np.testing.assert_allclose(run(artifact, {"obs": BATCH})["q"], BATCH @ WEIGHTS, rtol=1e-5)


def test_a_size_of_minus_one_is_an_open_axis(tmp_path: Path) -> None:
    made = model([LINEAR], [helper.make_tensor_value_info("obs", FLOAT, [-1, 4])])
    assert published(made, tmp_path).manifest.signature.max_batch > 1


def recurrent(batch: int | str) -> onnx.ModelProto:
    """A GRU of two layers with state as [layers, batch, hidden], as rsl_rl writes it."""
    rng = np.random.default_rng(2)
    nodes = [helper.make_node("Unsqueeze", ["obs", "zero"], ["x0"])]
    weights = [numpy_helper.from_array(np.array([0]), "zero"), numpy_helper.from_array(np.array([1]), "one")]
    for layer in range(2):
        for name, width in (("W", 4 if layer == 0 else 3), ("R", 3)):
            array = rng.standard_normal((1, 9, width)).astype(np.float32)
            weights.append(numpy_helper.from_array(array, f"{name}{layer}"))
        nodes += [
            helper.make_node("Gather", ["h_in", "zero" if layer == 0 else "one"], [f"h{layer}"], axis=0),
            helper.make_node(
                "GRU",
                [f"x{layer}", f"W{layer}", f"R{layer}", "", "", f"h{layer}"],
                [f"y{layer}", f"last{layer}"],
                hidden_size=3,
            ),
            helper.make_node("Squeeze", [f"y{layer}", "one"], [f"x{layer + 1}"]),
        ]
    nodes += [
        helper.make_node("Concat", ["last0", "last1"], ["h_out"], axis=0),
        helper.make_node("Squeeze", ["x2", "zero"], ["actions"]),
    ]
    values = [
        [helper.make_tensor_value_info(name, FLOAT, sizes) for name, sizes in given]
        for given in (
            [("obs", [batch, 4]), ("h_in", [2, batch, 3])],
            [("actions", [batch, 3]), ("h_out", [2, batch, 3])],
        )
    ]
    graph = helper.make_graph(nodes, "policy", *values, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize(("batch", "axes"), [("n", {}), ("n", {"h_in": 1, "h_out": 1}), (1, {})])
def test_state_may_have_the_batch_elsewhere(batch: int | str, axes: dict[str, int], tmp_path: Path) -> None:
    made = recurrent(batch)
    artifact = published(made, tmp_path, state={"h_in": "h_out"}, batch_axes=axes)
    signature = artifact.manifest.signature
    assert [spec.shape for spec in signature.request_inputs] == [(4,), (2, 3)]
    assert signature.max_batch == (1 if batch == 1 else 256)
    assert artifact.manifest.certificate["programs"]["onnx"]["rollout"]["steps"] == 200
    size = min(5, signature.max_batch)
    state = np.random.default_rng(3).standard_normal((size, 2, 3)).astype(np.float32)
    ours = run(artifact, {"obs": BATCH[:size], "h_in": state})
    reference = ReferenceEvaluator(made)
    theirs = reference.run(None, {"obs": BATCH[:size], "h_in": state.transpose(1, 0, 2)})
    np.testing.assert_allclose(ours["actions"], theirs[0].reshape(size, 3), atol=1e-5)
    np.testing.assert_allclose(ours["h_out"], theirs[1].transpose(1, 0, 2), atol=1e-5)


@pytest.mark.parametrize(("dtype", "sizes", "value"), [(BOOL, [], True), (FLOAT, [], 1.0), (INT64, [2], 1)])
def test_settings_are_given_a_constant(dtype: int, sizes: list[int], value: float, tmp_path: Path) -> None:
    nodes = [
        LINEAR,
        helper.make_node("Cast", ["is_training"], ["number"], to=FLOAT),
        helper.make_node("ReduceMax", ["number"], ["factor"], keepdims=0),
        helper.make_node("Mul", ["q", "factor"], ["scaled"]),
    ]
    setting = helper.make_tensor_value_info("is_training", dtype, sizes)
    scaled = helper.make_tensor_value_info("scaled", FLOAT, ["n", 3])
    made = model(nodes, [OBS, setting], [scaled])
    with pytest.raises(CaptureFailed, match=r"is_training: expected an axis for the batch.*--constant NAME=VALUE"):
        published(made, tmp_path)
    artifact = published(made, tmp_path, constants={"is_training": value})
    assert [spec.name for spec in artifact.manifest.signature.inputs] == ["obs"]
    assert artifact.manifest.programs["onnx"].rewrites == ("constant: is_training = 1",)
    np.testing.assert_allclose(run(artifact, {"obs": BATCH})["scaled"], BATCH @ WEIGHTS, rtol=1e-5)
    with pytest.raises(CaptureFailed, match="no input named 'train' to be constant; the file takes obs, is_training"):
        published(made, tmp_path, constants={"train": 1})


def test_outputs_that_no_input_changes_are_left_out(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["version_number"], value_floats=[3.0]),
        LINEAR,
        helper.make_node("Constant", [], ["memory_size"], value_float=0.0),
    ]
    extra = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("version_number", "memory_size")]
    artifact = published(model(nodes, outputs=[extra[0], Q, extra[1]]), tmp_path)
    assert artifact.manifest.signature.output_names == ("q",)
    assert artifact.manifest.programs["onnx"].rewrites == (
        "leave out version_number, which no input changes",
        "leave out memory_size, which no input changes",
    )


def test_what_is_not_of_onnx_is_refused(tmp_path: Path) -> None:
    label = helper.make_tensor_value_info("label", INT64, ["n"])
    maps = onnx.ValueInfoProto()
    maps.name = "probabilities"
    maps.type.sequence_type.elem_type.map_type.key_type = INT64
    maps.type.sequence_type.elem_type.map_type.value_type.tensor_type.elem_type = FLOAT
    zip_map = helper.make_node("ZipMap", ["q"], ["probabilities"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
    arg = helper.make_node("ArgMax", ["q"], ["label"], axis=1, keepdims=0)
    with pytest.raises(CaptureFailed, match=r"'probabilities' is ZipMap of ai.onnx.ml, .* convert without ZipMap"):
        published(model([LINEAR, arg, zip_map], outputs=[label, maps], domains=["ai.onnx.ml"]), tmp_path)
    with pytest.raises(CaptureFailed, match="is Layer of somewhere, which is not one of ONNX's own operators"):
        published(
            model([helper.make_node("Layer", ["obs"], ["q"], domain="somewhere")], domains=["somewhere"]), tmp_path
        )
    sequence = helper.make_tensor_sequence_value_info("pieces", FLOAT, None)
    split = helper.make_node("SplitToSequence", ["q"], ["pieces"], axis=1)
    with pytest.raises(CaptureFailed, match=r"pieces: expected a tensor; got a sequence. Leave it out"):
        published(model([LINEAR, split], outputs=[Q, sequence]), tmp_path)
    assert published(model([LINEAR, split], outputs=[Q, sequence]), tmp_path, outputs=["q"]).manifest.name == "x"


def test_a_file_is_described_on_the_command_line(tmp_path: Path) -> None:
    onnx.save(recurrent("n"), tmp_path / "robot.onnx")
    options = ["--state", "h_in=h_out", "--batch-axis", "h_in=1", "--output", "actions"]

    def export_it(target: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "actserve", "export", target, "--store", str(tmp_path / "store"), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)

    done = export_it("robot.onnx", *options)
    assert done.returncode == 0, done.stderr
    (state,) = ModelStore(tmp_path / "store").resolve("robot").manifest.signature.state
    assert (state.spec.name, state.spec.shape, state.output) == ("h_in", (2, 3), "h_out")
    refused = export_it("robot.onnx", "--constant", "is_training=yes")
    assert (refused.returncode, refused.stderr) == (2, "error: --constant takes NAME=VALUE; got 'is_training=yes'\n")
    refused = export_it("pong", "--output", "action")
    assert refused.returncode == 2
    assert "are for .onnx files; got pong" in refused.stderr
