"""Files as other exporters write them: functions, open axes, settings, batches elsewhere, outputs of no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from actserve.core.errors import CaptureFailed, UsageError
from actserve.core.signature import Arrays
from actserve.engine.runtimes.load import load
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve_export.publish import export
from actserve_export.sources.onnx_source import OnnxSource
from tests.command_line import Done, actserve

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


def function(name: str, nodes: Any, opset: int = 18) -> onnx.FunctionProto:
    return helper.make_function(
        "mine", name, ["x", "w"], ["y"], nodes, [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    )


PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"])
CALL = helper.make_node("Layer", ["obs", "weights"], ["q"], domain="mine")


@pytest.mark.parametrize("kind", ["one", "nested", "in a branch", "of another opset"])
def test_functions_of_the_file_are_inlined(kind: str, tmp_path: Path) -> None:
    inner = function("Layer", [PRODUCT], 12 if kind == "of another opset" else 18)
    nodes, inputs, constants = [CALL], [OBS], {}
    functions = [inner]
    if kind == "nested":
        functions.append(function("Outer", [helper.make_node("Layer", ["x", "w"], ["y"], domain="mine")]))
        nodes = [helper.make_node("Outer", ["obs", "weights"], ["q"], domain="mine")]
    if kind == "in a branch":
        zero = helper.make_node("Constant", [], ["zero"], value_floats=[0.0])
        branches = [
            helper.make_graph([node], "branch", [], [helper.make_tensor_value_info(node.output[0], FLOAT, None)])
            for node in (CALL, zero)
        ]
        nodes = [helper.make_node("If", ["eval"], ["answer"], then_branch=branches[0], else_branch=branches[1])]
        inputs, constants = [OBS, helper.make_tensor_value_info("eval", BOOL, [])], {"eval": True}
    answer = helper.make_tensor_value_info("answer" if constants else "q", FLOAT, ["n", 3])
    artifact = published(
        model(nodes, inputs, [answer], domains=["mine"], functions=functions), tmp_path, constants=constants
    )
    assert "mine" not in artifact.read("graph.txt").decode()
    np.testing.assert_allclose(run(artifact, {"obs": BATCH})[answer.name], BATCH @ WEIGHTS, rtol=1e-5)


@pytest.mark.parametrize("size", [-1, 0])
def test_a_size_of_minus_one_or_zero_is_an_open_axis(size: int, tmp_path: Path) -> None:
    made = model([LINEAR], [helper.make_tensor_value_info("obs", FLOAT, [size, 4])])
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


@pytest.mark.parametrize(("batch", "axes"), [("n", {}), ("n", {"h_in": 1, "h_out": -2}), (1, {})])
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


@pytest.mark.parametrize(
    ("dtype", "sizes", "value"), [(BOOL, [], True), (FLOAT, [], 1.0), (INT64, [2], [1, 1]), (BOOL, [1], 1)]
)
def test_settings_are_given_a_constant(dtype: int, sizes: list[int], value: Any, tmp_path: Path) -> None:
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
    with pytest.raises(CaptureFailed, match="is_training: expected"):
        published(made, tmp_path, constants={"is_training": 0.5 if dtype == INT64 else [1, 0, 1, 0, 1]})


def test_a_setting_that_has_it_draw_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["obs", "weights"], ["x"]),
        helper.make_node("Constant", [], ["ratio"], value_float=0.5),
        helper.make_node("Dropout", ["x", "ratio", "train"], ["q"]),
    ]
    made = model(nodes, [OBS, helper.make_tensor_value_info("train", BOOL, [])])
    with pytest.raises(CaptureFailed, match=r"the same inputs give another q each time: .* Dropout in training mode"):
        published(made, tmp_path, constants={"train": True})
    artifact = published(made, tmp_path, constants={"train": False})
    np.testing.assert_allclose(run(artifact, {"obs": BATCH})["q"], BATCH @ WEIGHTS, rtol=1e-5)


def test_outputs_that_no_input_changes_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nodes = [
        helper.make_node("Constant", [], ["version_number"], value_floats=[3.0]),
        LINEAR,
        helper.make_node("Shape", ["obs"], ["width"], start=1),
    ]
    extra = [
        helper.make_tensor_value_info("version_number", FLOAT, [1]),
        helper.make_tensor_value_info("width", INT64, [1]),
    ]
    weights = helper.make_tensor_value_info("weights", FLOAT, [4, 3])
    made = model(nodes, outputs=[extra[0], Q, extra[1], weights])
    artifact = published(made, tmp_path)
    assert artifact.manifest.signature.output_names == ("q",)
    left_out = ("version_number", "width", "weights")
    assert artifact.manifest.programs["onnx"].rewrites == tuple(
        f"leave out {name}, which no input changes" for name in left_out
    )
    assert caplog.messages == [f"left out the output {name}: no input changes it" for name in left_out]
    with pytest.raises(CaptureFailed, match="version_number: expected an axis for the batch; for 5 items"):
        published(made, tmp_path, outputs=["version_number"])
    with pytest.raises(CaptureFailed, match="expected an observation and an output that depends on it"):
        published(model(nodes[:1], outputs=extra[:1]), tmp_path)


def test_an_input_that_is_an_output_too(tmp_path: Path) -> None:
    artifact = published(model([LINEAR], outputs=[Q, OBS]), tmp_path)
    np.testing.assert_array_equal(run(artifact, {"obs": BATCH})["obs"], BATCH)


def test_what_is_not_of_onnx_is_refused(tmp_path: Path) -> None:
    label = helper.make_tensor_value_info("label", INT64, ["n"])
    maps = onnx.ValueInfoProto()
    maps.name = "probabilities"
    maps.type.sequence_type.elem_type.map_type.key_type = INT64
    maps.type.sequence_type.elem_type.map_type.value_type.tensor_type.elem_type = FLOAT
    zip_map = helper.make_node("ZipMap", ["q"], ["probabilities"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
    arg = helper.make_node("ArgMax", ["q"], ["label"], axis=1, keepdims=0)
    with pytest.raises(CaptureFailed, match=r"'probabilities' is ZipMap of ai.onnx.ml, .* zipmap=False"):
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


def batch_at(axis: int) -> dict[str, Any]:
    return {"state": {"h_in": "h_out"}, "batch_axes": {"h_out": axis}}


def with_input(dtype: int, sizes: Any = ("n", 4)) -> onnx.ModelProto:
    cast = helper.make_node("Cast", ["obs"], ["x"], to=FLOAT)
    return model(
        [cast, helper.make_node("MatMul", ["x", "weights"], ["q"])],
        [helper.make_tensor_value_info("obs", dtype, sizes)],
    )


GELU = helper.make_node("Gelu", ["obs"], ["q"], domain="com.microsoft")
DOUBLE = helper.make_tensor_value_info("q", FLOAT, ["n", 6])
DOUBLED = helper.make_node("Concat", ["h", "h"], ["q"], axis=1)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (with_input(TensorProto.UINT32), {}, "obs: expected one of uint8, .*; got uint32. Export the file with one"),
        (with_input(TensorProto.STRING), {}, "got strings"),
        (with_input(0), {}, "obs: the file states no dtype"),
        (with_input(FLOAT, None), {}, "obs: the file does not state its shape"),
        (with_input(FLOAT, ["n", -1]), {}, "expected one open axis, the batch; .* Export the file with a fixed size"),
        (with_input(FLOAT, [4]), {}, "expected an axis for the batch"),
        (model([GELU], domains=["com.microsoft"]), {}, "is Gelu of com.microsoft, .* without the optimiser"),
        (recurrent("n"), batch_at(7), r"h_out: expected an axis for the batch; .* \(2, 5, 3\).*--batch-axis NAME=AXIS"),
        (recurrent("n"), batch_at(0), r"h_out: expected an axis for the batch; .* \(2, 5, 3\)"),
        (
            model([DOUBLED], [OBS, helper.make_tensor_value_info("h", FLOAT, ["n", 3])], [OBS, DOUBLE]),
            {"outputs": ["obs"], "state": {"h": "q"}},
            r"state: h is float32\[3\] an item, but q, which replaces it, is float32\[6\]",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    made: onnx.ModelProto, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CaptureFailed, match=message):
        published(made, tmp_path, **options)


def test_a_newer_or_an_empty_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    made = model([LINEAR])
    made.ir_version = 99
    with pytest.raises(CaptureFailed, match="refused the file: Unsupported model IR version: 99, max supported"):
        published(made, tmp_path)
    with pytest.raises(UsageError, match=r"x\.onnx is no \.onnx file that can be read: it is empty"):
        published(onnx.ModelProto(), tmp_path)


def test_a_file_is_described_on_the_command_line(tmp_path: Path) -> None:
    onnx.save(recurrent("n"), tmp_path / "robot.onnx")
    options = ["--state", "h_in=h_out", "--batch-axis", "h_in=1", "--output", "actions"]

    def export_it(target: str, *options: str) -> Done:
        return actserve("export", target, "--store", str(tmp_path / "store"), *options, cwd=tmp_path)

    done = export_it("robot.onnx", *options)
    assert done.returncode == 0, done.stderr
    (state,) = ModelStore(tmp_path / "store").resolve("robot").manifest.signature.state
    assert (state.spec.name, state.spec.shape, state.output) == ("h_in", (2, 3), "h_out")
    refused = export_it("robot.onnx", "--constant", "is_training=yes")
    assert (refused.returncode, refused.stderr) == (2, "error: --constant takes NAME=VALUE; got 'is_training=yes'\n")
    refused = export_it("pong", "--output", "action")
    assert refused.returncode == 2
    assert "are for .onnx files; got pong" in refused.stderr
