"""Finds operators that mix the items of a batch in a traced graph, also where no sample shows it.

`torch.where((x > 30).any(), a, b)` acts differently only beside an item that has a 31. The graph shows it: the axis of
the batch has a symbolic size, so that an operator whose result has no such axis has reduced the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from actserve_export.capture.arguments import arguments_of
from actserve_export.programs.reasons import line_of

aten: Any = torch.ops.aten
# Operators whose result has the shape of their input, and that mix along an axis.
_ALONG_AXIS = {
    aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.cumsum, aten.cumprod, aten.cummax,
    aten.cummin, aten.logcumsumexp, aten.sort, aten.argsort, aten.topk, aten.flip, aten.roll,
}  # fmt: skip
# Operators whose result has nothing of the values of their input.
_NO_VALUES = {aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full, aten.empty_like, aten.zeros_like}


def mixing_reason(program: ExportedProgram) -> str | None:
    """The reason why the items of `program`, traced with a symbolic batch, cannot share a batch; None without one."""
    for node in _that_matter(program.graph):
        if _mixes(node):
            name = str(node.target).removeprefix("aten.").split(".")[0]
            place = line_of(node)
            return (
                f"an item's result depends on the other items of its batch: torch's {name} looks at all of them{place}"
            )
    return None


def _that_matter(graph: fx.Graph) -> list[fx.Node]:
    """The operators on which the outputs may depend."""
    reached: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output" or _writes(node)]
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting.extend(node.all_input_nodes)
    return [node for node in graph.nodes if node in reached and node.op == "call_function"]


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _mixes(node: fx.Node) -> bool:
    inputs = [value for argument in node.all_input_nodes for value in _tensors(argument)]
    outputs = _tensors(node)
    if not outputs or not any(map(_open_axes, inputs)):
        return False
    packet = getattr(node.target, "overloadpacket", node.target)
    if packet in _NO_VALUES:
        return False
    if packet in _ALONG_AXIS:
        return any(axis in _open_axes(inputs[0]) for axis in _axes(node, inputs[0].dim()))
    open_axes = [_open_axes(output) for output in outputs]
    return not any(open_axes) or any(len(axes) > 1 for axes in open_axes)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]


def _open_axes(tensor: torch.Tensor) -> list[int]:
    """The axes whose size depends on that of the batch."""
    return [axis for axis, size in enumerate(tensor.shape) if not isinstance(size, int)]


def _axes(node: fx.Node, rank: int) -> list[int]:
    """The axes along which an operator works; all without an argument that says so."""
    values = arguments_of(node)
    found = values.get("dim", values.get("dims"))
    if isinstance(found, int):
        return [found % rank]
    return [axis % rank for axis in found or range(rank)]  # torch.roll(x, 1) has an empty list: it works along all
