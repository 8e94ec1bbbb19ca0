"""An `.onnx` file as the policy: its signature, its certificate, and the files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from actserve.core.errors import CaptureFailed, UsageError
from actserve.engine import golden
from actserve.engine.runtimes.load import load
from actserve.store.local import ModelStore
from actserve_export.capture import capture
from actserve_export.publish import export
from actserve_export.sources.onnx_source import OnnxSource
from actserve_export.targets import find_source

WEIGHTS = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
LINEAR = [helper.make_node("MatMul", ["obs", "weights"], ["q"], doc_string="File /home/me/mine.py, line 3")]


def write(
    path: Path, nodes: Any = LINEAR, inputs: Any = None, outputs: Any = None, dtype: int = TensorProto.FLOAT
) -> Path:
    """A file that takes `inputs` and gives `outputs`, (name, sizes) each; the weights are (4, 3) float32."""
    values = [
        [helper.make_tensor_value_info(name, dtype, sizes) for name, sizes in given]
        for given in (inputs or [("obs", ["n", 4])], outputs or [("q", ["n", 3])])
    ]
    graph = helper.make_graph(nodes, "policy", *values, [numpy_helper.from_array(WEIGHTS, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def test_it_is_certified_against_itself_and_published(tmp_path: Path) -> None:
    name, source = find_source(str(write(tmp_path / "My_Policy.onnx")), action="argmax")
    assert name == "my-policy"
    said: list[str] = []
    store = ModelStore(tmp_path / "store")
    artifact = export(source, name, store, origin="My_Policy.onnx", progress=said.append).artifact
    manifest = artifact.manifest
    assert "no .pt2: the policy can be built for onnx only" in said
    assert [f"{spec.name} {spec}" for spec in manifest.signature.observations] == ["obs float32[4]"]
    assert [f"{spec.name} {spec}" for spec in manifest.signature.outputs] == ["action int64[]", "q float32[3]"]
    assert manifest.signature.max_batch == 256
    assert set(manifest.programs) == set(manifest.certificate["programs"]) == {"onnx"}
    assert manifest.programs["onnx"].rewrites == ("action: the largest of q",)
    assert manifest.certificate["reference"].startswith("the .onnx file as it was given, item by item")
    assert manifest.certificate["programs"]["onnx"]["compared"] == 4 * 512
    assert str(tmp_path) not in (artifact.folder / "manifest.json").read_text()
    assert b"mine.py" not in artifact.read_program("onnx")
    assert "ArgMax" in artifact.read("graph.txt").decode()
    batch = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    runtime = load("onnx", artifact)
    given = runtime.run({"obs": batch})
    np.testing.assert_array_equal(given["action"], (batch @ WEIGHTS).argmax(1))
    assert golden.check(artifact, runtime.run).holds
    runtime.close()
    assert not export(source, name, store, origin="My_Policy.onnx").published


def test_a_file_for_one_item_takes_one_at_a_time(tmp_path: Path) -> None:
    captured = capture(OnnxSource(write(tmp_path / "one.onnx", inputs=[("obs", [1, 4])], outputs=[("q", [1, 3])])))
    assert captured.signature.max_batch == 1
    assert captured.run_reference({"obs": np.ones((2, 4), np.float32)})["q"].shape == (2, 3)


@pytest.mark.parametrize("least", [-1e9, 1e3])  # with 1e3, no sample shows it
def test_a_file_that_mixes_the_items_of_a_batch_takes_one_at_a_time(least: float, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["axes"], value_ints=[0]),
        helper.make_node("Constant", [], ["least"], value_float=least),
        helper.make_node("ReduceMax", ["obs", "axes"], ["largest"], keepdims=1),
        helper.make_node("Max", ["largest", "least"], ["most"]),
        helper.make_node("Sub", ["obs", "most"], ["q"]),
    ]
    path = write(tmp_path / "mixed.onnx", nodes, outputs=[("q", ["n", 4])])
    assert capture(OnnxSource(path)).signature.max_batch == 1


STEP = [
    helper.make_node("MatMul", ["obs", "weights"], ["q"]),
    helper.make_node("Add", ["q", "h_in"], ["h_out"]),
    helper.make_node("Tanh", ["h_out"], ["a"]),
]
STEP_IO: Any = {
    "inputs": [("obs", ["n", 4]), ("h_in", ["n", 3])],
    "outputs": [("q", ["n", 3]), ("h_out", ["n", 3]), ("a", None)],
}


def test_state_is_carried_and_outputs_are_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "step.onnx", STEP, **STEP_IO)
    source = OnnxSource(path, outputs=("a",), state={"h_in": "h_out"})
    artifact = export(source, "step", ModelStore(tmp_path / "store"), origin="step.onnx").artifact
    signature = artifact.manifest.signature
    assert [(state.spec.name, state.output) for state in signature.state] == [("h_in", "h_out")]
    assert [f"{spec.name} {spec}" for spec in signature.outputs] == ["a float32[3]"]
    assert artifact.manifest.certificate["programs"]["onnx"]["rollout"]["steps"] == 200
    assert artifact.manifest.programs["onnx"].rewrites == ("leave out q",)


NAMED_ACTION = [
    helper.make_node("MatMul", ["obs", "weights"], ["action"]),
    helper.make_node("Relu", ["action"], ["q"]),
]
LARGEST = [helper.make_node("ReduceMax", ["obs"], ["q"], keepdims=0)]


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ({"inputs": [("obs", [8, 4])]}, {}, r"an axis for the batch, open or of size 1; the file's shape is \[8, 4"),
        ({"inputs": [("obs", ["n", "m"])]}, {}, "expected one open axis, the batch"),
        ({"nodes": [helper.make_node("Relu", ["seed"], ["q"])], "inputs": [("seed", ["n", 3])]}, {}, "requests use"),
        ({"dtype": TensorProto.DOUBLE}, {}, "ONNX Runtime refused the file"),
        ({}, {"outputs": ("a",)}, "no output named 'a'; the file gives q"),
        ({}, {"state": {"h": "q"}}, "no input named 'h' to be state; the file takes obs"),
        ({}, {"action": "mean"}, "expected an action of argmax or identity; got 'mean'"),
        ({"nodes": [helper.make_node("RandomNormalLike", ["obs"], ["q"])]}, {}, "RandomNormalLike draws random"),
        ({"nodes": NAMED_ACTION}, {"action": "argmax"}, "a tensor named 'action' already"),
        ({"nodes": LARGEST}, {}, "q: expected an axis for the batch"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_policy_is_refused(
    tmp_path: Path, how: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "policy.onnx", **how)
    with pytest.raises(CaptureFailed, match=message):
        capture(OnnxSource(path, **options))


def test_what_is_no_file_or_can_be_no_pt2_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"junk\.onnx is no \.onnx file that can be read"):
        capture(OnnxSource(tmp_path / "junk.onnx"))
    source = OnnxSource(write(tmp_path / "policy.onnx"))
    with pytest.raises(UsageError, match="this policy can be built for onnx; got pt2"):
        export(source, "policy", ModelStore(tmp_path / "store"), origin="x", runtimes=["pt2"])
    with pytest.raises(UsageError, match="--checkpoint is for policies of PyTorch"):
        find_source(str(tmp_path / "policy.onnx"), checkpoint=tmp_path / "weights.safetensors")


def test_weights_in_a_file_of_their_own_are_taken_in(tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path / "whole.onnx"))
    onnx.save(model, tmp_path / "parted.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    captured = capture(OnnxSource(tmp_path / "parted.onnx"))
    captured.build("onnx", tmp_path, {})
    assert len(onnx.load(tmp_path / "policy.onnx", load_external_data=False).graph.initializer[0].raw_data) == 48
