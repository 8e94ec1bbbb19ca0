"""Brings the graph of a user's `.onnx` file into the form that is served: ONNX's operators, tensors, batch first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx.inliner import inline_local_functions

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Array
from actserve_export.programs.onnx_graph import nodes_of

_DOMAINS = ("", "ai.onnx", "com.microsoft")  # the last: operators that ONNX Runtime's optimiser puts in


def plain(model: Any) -> Any:
    """A copy of `model` with its local functions inlined, and no size for open axes.

    Raises `CaptureFailed` for operators of other domains, and for inputs that are no tensors.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(inline_local_functions(model) if model.functions else model)
    graph = copy.graph
    for node in nodes_of(graph):
        if node.domain not in _DOMAINS:
            raise CaptureFailed(
                f"the node {node.name or node.output[0]!r} is {node.op_type} of {node.domain}, which is not one of "
                "ONNX's own operators (for scikit-learn: convert without ZipMap; trees and linear models of "
                "ai.onnx.ml cannot be exported)"
            )
    opsets = [entry for entry in copy.opset_import if entry.domain in _DOMAINS]
    del copy.opset_import[:]
    copy.opset_import.extend(opsets)
    if not graph.output:
        raise CaptureFailed("the file has no outputs; a policy gives at least an action")
    for value in graph.input:
        if not value.type.HasField("tensor_type"):
            raise CaptureFailed(f"{value.name}: expected a tensor; got {_kind(value)}")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_value") and axis.dim_value <= 0:
                axis.Clear()
    return copy


def _kind(value: Any) -> str:
    return f"a {value.type.WhichOneof('value').removesuffix('_type')}"


def tensors_only(graph: Any, names: Iterable[str]) -> None:
    """Raises `CaptureFailed` if an output of `names` is no tensor, such as a sequence of maps."""
    for value in graph.output:
        if value.name in names and not value.type.HasField("tensor_type"):
            raise CaptureFailed(f"{value.name}: expected a tensor; got {_kind(value)}. Leave it out: name the outputs")


def fix_constants(graph: Any, constants: Mapping[str, float]) -> dict[str, Array]:
    """Replace inputs by constants, in place -> the arrays by name. Raises `CaptureFailed` for an unknown input."""
    values = {value.name: value for value in graph.input}
    arrays = {}
    for name, number in constants.items():
        if name not in values:
            raise CaptureFailed(f"no input named {name!r} to be constant; the file takes {', '.join(values)}")
        tensor = values[name].type.tensor_type
        sizes = [axis.dim_value or 1 for axis in tensor.shape.dim]
        arrays[name] = np.full(sizes, number, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        graph.input.remove(values[name])
        for default in [tensor for tensor in graph.initializer if tensor.name == name]:
            graph.initializer.remove(default)
        graph.initializer.append(onnx.numpy_helper.from_array(arrays[name], name))
    return arrays


def constant_outputs(graph: Any) -> list[str]:
    """The outputs that no input reaches, such as the version number that ML-Agents writes."""
    weights = {tensor.name for tensor in graph.initializer}
    reached = {value.name for value in graph.input} - weights
    for node in graph.node:  # in topological order
        inner = {name for body in _bodies(node) for each in nodes_of(body) for name in each.input}
        if reached & ({*node.input} | inner):
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


def _bodies(node: Any) -> list[Any]:
    return [body for attribute in node.attribute for body in (attribute.g, *attribute.graphs)]
