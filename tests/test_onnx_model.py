"""Refused `.onnx` models. Each is first run in ONNX Runtime, to show that the reason of the refusal is true."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from actserve.core.errors import RuntimeFailure
from actserve.engine.runtimes.load import load
from actserve.engine.runtimes.onnx_check import CHILDREN, inspect_model
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from tests.publishing import republish

SIZE = 64  # ONNX Runtime copies smaller tensors out of the model, and never looks for their files
ELSEWHERE = "it has tensors in other files"


def external(name: str = "w", location: str = "weights.bin") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[SIZE], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(4 * SIZE))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def inside(name: str = "w") -> TensorProto:
    return numpy_helper.from_array(np.full(SIZE, 5, np.float32), name)


def model(nodes: list[NodeProto], tensors: list[TensorProto], domain: str = "") -> bytes:
    """A model that takes x (SIZE,) float32 and gives y, alike."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIZE]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    imports = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    made: ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return bytes(made.SerializeToString())


def add(tensor: TensorProto) -> bytes:
    return model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


def in_attribute(tensor: TensorProto) -> bytes:
    return model(
        [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["x", "w"], ["y"])], []
    )


def in_subgraph(tensor: TensorProto) -> bytes:
    info = helper.make_tensor_value_info("z", TensorProto.FLOAT, [SIZE])
    branch = helper.make_graph([helper.make_node("Add", ["x", "w"], ["z"])], "b", [], [info], [tensor])
    true = numpy_helper.from_array(np.array(True), "c")
    return model([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], [true])


PLACES = [add, in_attribute, in_subgraph]


def run(data: bytes) -> float:
    """The first number that ONNX Runtime, given these bytes, makes of zeros."""
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return float(session.run(None, {"x": np.zeros(SIZE, np.float32)})[0][0])


@pytest.mark.parametrize("place", PLACES)
def test_tensors_in_other_files_are_refused(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.full(SIZE, 7, np.float32).tofile("weights.bin")
    assert run(place(external())) == 7, "given bytes alone, it reads a file of the current folder"
    assert inspect_model(place(external())) == ELSEWHERE
    assert run(place(inside())) == 5
    assert inspect_model(place(inside())) is None


@pytest.mark.parametrize("location", ["/etc/passwd", "../../etc/passwd", "", "*/_ORT_MEM_ADDR_/*"])
def test_wherever_they_are(location: str) -> None:
    assert inspect_model(add(external(location=location))) == ELSEWHERE


def test_half_a_reference_is_one() -> None:
    located = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[SIZE], data_location=TensorProto.EXTERNAL)
    listed = inside()
    listed.external_data.add(key="location", value="weights.bin")
    assert [inspect_model(add(tensor)) for tensor in (located, listed)] == [ELSEWHERE, ELSEWHERE]


def test_sparse_tensors_training_graphs_and_functions_are_looked_at() -> None:
    sparse = onnx.SparseTensorProto(values=external(), indices=inside("i"), dims=[SIZE])
    graph = onnx.GraphProto(sparse_initializer=[sparse])
    training = onnx.TrainingInfoProto(algorithm=onnx.GraphProto(initializer=[external()]))
    attributes = [AttributeProto(sparse_tensors=[sparse]), AttributeProto(graphs=[graph]), AttributeProto(t=external())]
    models = [ModelProto(graph=graph), ModelProto(training_info=[training])]
    nodes = [NodeProto(attribute=[attribute]) for attribute in attributes]
    models += [ModelProto(graph=onnx.GraphProto(node=[node])) for node in nodes]
    models += [ModelProto(functions=[onnx.FunctionProto(node=[node])]) for node in nodes]
    models += [ModelProto(functions=[onnx.FunctionProto(attribute_proto=attributes[:1])])]
    assert {inspect_model(found.SerializeToString()) for found in models} == {ELSEWHERE}


def test_operators_that_are_not_onnxs_own_are_refused() -> None:
    foreign = model([helper.make_node("Foo", ["x"], ["y"], domain="com.evil")], [], "com.evil")
    assert inspect_model(foreign) == "it uses an operator of 'com.evil', none of ONNX's own"
    contributed = model([helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")], [], "com.microsoft")
    assert run(contributed) == 0
    assert inspect_model(contributed) == "it uses an operator of 'com.microsoft', none of ONNX's own"
    spelled = model([helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")], [])
    assert (run(spelled), inspect_model(spelled)) == (0, None)


def test_a_message_in_two_pieces_is_looked_at_whole() -> None:
    """Protobuf joins repeated fields, so the bytes of two models in a row are one model."""
    hidden = add(inside()) + ModelProto(graph=onnx.GraphProto(initializer=[external("v")])).SerializeToString()
    assert onnx.load_from_string(hidden).graph.initializer[1].name == "v"
    assert inspect_model(hidden) == ELSEWHERE


@pytest.mark.parametrize(
    "data", [b"not a model", b"\x3a\x7f", b"\x3b", b"\x00", b"\xff" * 20, b"\x3a\xff\xff\xff\xff\x7f"]
)
def test_what_is_no_protobuf_is_refused(data: bytes) -> None:
    assert inspect_model(data) == "it is not an ONNX model"


@given(st.binary(max_size=60), st.integers(0, 400), st.binary(max_size=8))
def test_any_bytes_get_an_answer(data: bytes, at: int, patch: bytes) -> None:
    inspect_model(data)
    good = add(inside())
    inspect_model(good[:at] + patch + good[at + len(patch) :])


def test_deep_nesting_is_no_recursion() -> None:
    graph = b""
    for _ in range(20_000):
        attribute = b"\x32" + _size(graph)
        node = b"\x2a" + _size(attribute)
        graph = b"\x0a" + _size(node)
    assert inspect_model(b"\x3a" + _size(graph)) is None  # and protobuf, which allows 100 levels, refuses it


def _size(content: bytes) -> bytes:
    """`content` behind its length."""
    count, length = len(content), bytearray()
    while count > 0x7F:
        length.append(count & 0x7F | 0x80)
        count >>= 7
    return bytes(length) + bytes([count]) + content


def _messages(descriptor: Any) -> Iterator[Any]:
    """A message type and all below it."""
    found, waiting = {}, [descriptor]
    while waiting:
        descriptor = waiting.pop()
        if descriptor.name not in found:
            found[descriptor.name] = descriptor
            waiting += [field.message_type for field in descriptor.fields if field.message_type is not None]
    return iter(found.values())


def test_the_table_has_every_way_to_a_tensor_or_a_node() -> None:
    messages = list(_messages(ModelProto.DESCRIPTOR))
    leading = {"TensorProto", "NodeProto"}
    for _ in messages:
        leading |= {m.name for m in messages if {f.message_type.name for f in m.fields if f.message_type} & leading}
    for message in messages:
        fields = {f.number: f.message_type.name for f in message.fields if f.message_type}
        below = {number: name for number, name in fields.items() if name in leading}
        assert CHILDREN.get(message.name, {}) == below
    tensor, node = TensorProto.DESCRIPTOR.fields_by_name, NodeProto.DESCRIPTOR.fields_by_name
    assert (tensor["external_data"].number, tensor["data_location"].number, node["domain"].number) == (13, 14, 7)


def replaced(cart: Artifact, tmp_path: Path, data: bytes) -> Artifact:
    """The cart with another `.onnx`."""
    (tmp_path / "policy.onnx").write_bytes(data)
    return republish(cart, ModelStore(tmp_path / "store"), {"policy.onnx": tmp_path / "policy.onnx"})


def test_the_runtime_never_sees_what_is_refused(
    cart: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "InferenceSession", None)
    artifact = replaced(cart, tmp_path, add(external()))
    with pytest.raises(RuntimeFailure, match=r"cart@1: actserve refused the \.onnx program: it has tensors in other"):
        load("onnx", artifact)


def test_another_format_under_the_same_name_is_refused(
    cart: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "policy.ort")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(cart.read_program("onnx"), options, providers=["CPUExecutionProvider"])
    data = (tmp_path / "policy.ort").read_bytes()
    assert ort.InferenceSession(data, providers=["CPUExecutionProvider"]), "it would open, operators unseen"
    artifact = replaced(cart, tmp_path, data)
    with pytest.raises(RuntimeFailure, match=r"actserve refused the \.onnx program: it is not an ONNX model"):
        load("onnx", artifact)
    monkeypatch.setattr(
        "actserve.engine.runtimes.onnx_runtime.inspect_model", lambda data: None
    )  # as if it were a good model as well
    with pytest.raises(RuntimeFailure, match=r"ONNX Runtime refused the program"):
        load("onnx", artifact)


def test_what_the_exporter_makes_is_accepted(cart: Artifact) -> None:
    assert inspect_model(cart.read_program("onnx")) is None
