"""Brings the graph of a user's `.onnx` file into the form that is served: ONNX's operators, tensors, batch first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.inliner import inline_local_functions

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Array
from actserve_export.programs.onnx_graph import dtype_in_file, nodes_inside, nodes_of

_DOMAINS = ("", "ai.onnx")
_REMEDIES = {
    "ai.onnx.ml": "for scikit-learn, convert with zipmap=False; its trees and linear models cannot be exported",
    "com.microsoft": "export the file without the optimiser of ONNX Runtime, which puts such operators in",
}


def open_axes(model: Any) -> None:
    """Sizes of -1 and 0, which some exporters write for an open axis, are left out, in place."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_value") and axis.dim_value <= 0:
                axis.Clear()


def plain(model: Any) -> Any:
    """A copy of `model` with its local functions inlined.

    Raises `CaptureFailed` for operators of other domains, and for inputs that are no tensors.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(_inlined(model) if model.functions else model)
    graph = copy.graph
    for node in nodes_of(graph):
        if node.domain not in _DOMAINS:
            raise CaptureFailed(
                f"the node {node.name or node.output[0]!r} is {node.op_type} of {node.domain}, which is not one of "
                f"ONNX's own operators: {_REMEDIES.get(node.domain, 'export the file with those only')}"
            )
    opsets = [entry for entry in copy.opset_import if entry.domain in _DOMAINS]
    del copy.opset_import[:]
    copy.opset_import.extend(opsets)
    if not graph.output:
        raise CaptureFailed("the file has no outputs; a policy gives at least an action")
    for value in graph.input:
        if not value.type.HasField("tensor_type"):
            raise CaptureFailed(f"{value.name}: expected a tensor; got {_kind(value)}. Export the file without it")
    return copy


def _inlined(model: Any) -> Any:
    """`model` without local functions. onnx rewrites those of another opset, but must be told the types of weights."""
    inlined = inline_local_functions(model)
    if not inlined.functions:
        return inlined
    for tensor in inlined.graph.initializer:
        inlined.graph.value_info.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        return inline_local_functions(onnx.shape_inference.infer_shapes(inlined), convert_version=True)
    except Exception as error:  # the C++ part of onnx raises several types
        names = ", ".join(sorted({function.name for function in inlined.functions}))
        raise CaptureFailed(
            f"functions of the file have another opset than the file ({names}) and cannot be inlined; export the file "
            "with one opset"
        ) from error


def _kind(value: Any) -> str:
    kind = (value.type.WhichOneof("value") or "no type").removesuffix("_type")
    return {"optional": "an optional", "no type": kind}.get(kind, f"a {kind}")


def tensors_only(graph: Any, names: Iterable[str]) -> None:
    """Raises `CaptureFailed` if an output of `names` is no tensor, such as a sequence of maps."""
    for value in graph.output:
        if value.name in names and not value.type.HasField("tensor_type"):
            raise CaptureFailed(
                f"{value.name}: expected a tensor; got {_kind(value)}. Leave it out: name the other outputs, with "
                "outputs or --output"
            )


def fix_constants(graph: Any, constants: Mapping[str, Any]) -> dict[str, Array]:
    """Replace inputs by constants, in place -> the arrays by name. Raises `CaptureFailed`."""
    values = {value.name: value for value in graph.input}
    arrays = {}
    for name, number in constants.items():
        if name not in values:
            raise CaptureFailed(f"no input named {name!r} to be constant; the file takes {', '.join(values)}")
        arrays[name] = _constant(name, number, values[name].type.tensor_type)
        graph.input.remove(values[name])
        for default in [tensor for tensor in graph.initializer if tensor.name == name]:
            graph.initializer.remove(default)
        graph.initializer.append(onnx.numpy_helper.from_array(arrays[name], name))
    return arrays


def _constant(name: str, given: Any, declared: Any) -> Array:
    dtype = dtype_in_file(name, declared)
    sizes = [axis.dim_value or 1 for axis in declared.shape.dim]
    try:
        numbers = np.broadcast_to(np.asarray(given, np.float64), sizes)
    except ValueError as error:
        raise CaptureFailed(f"{name}: expected numbers of shape {sizes} as its constant; got {given!r}") from error
    array = numbers.astype(dtype)
    if dtype.kind in "biu" and not np.array_equal(array, numbers):
        raise CaptureFailed(f"{name}: expected a constant of {dtype}; got {given!r}")
    return array


def constant_outputs(graph: Any, ignored: Sequence[str] = ()) -> list[str]:
    """The outputs that no input reaches, such as the version number that ML-Agents writes.

    Operators of the types in `ignored` pass nothing on.
    """
    weights = {tensor.name for tensor in graph.initializer}
    reached = {value.name for value in graph.input} - weights
    for node in graph.node:  # in topological order
        inner = {name for each in nodes_inside(node) for name in each.input}
        if node.op_type not in ignored and reached & ({*node.input} | inner):
            reached |= {*node.output}
    return [value.name for value in graph.output if value.name not in reached]


def move_batch_first(graph: Any, axes: Mapping[str, int], ranks: Mapping[str, int]) -> None:
    """Have the inputs and outputs in `axes` take and give the batch first, in place; `axes` says where the file has it.

    `ranks` has their numbers of axes, with the batch.
    """
    inputs = {value.name for value in graph.input}
    before, after = [], []
    for name, axis in axes.items():
        inside = f"{name}/as_in_file"
        _rename(graph, name, inside)
        order = list(range(ranks[name]))
        if name in inputs:
            before.append(onnx.helper.make_node("Transpose", [name], [inside], perm=_moved(order, 0, axis)))
        else:
            after.append(onnx.helper.make_node("Transpose", [inside], [name], perm=_moved(order, axis, 0)))
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    if axes:
        del graph.value_info[:]  # of the tensors as they were called before


def _moved(order: list[int], source: int, target: int) -> list[int]:
    order = order.copy()
    order.insert(target, order.pop(source))
    return order


def _rename(graph: Any, old: str, new: str) -> None:
    for node in nodes_of(graph):
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
