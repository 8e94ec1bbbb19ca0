"""Arithmetic in float16 and bfloat16, written as arithmetic in float32 whose results are rounded.

torch does the same inside of each operator on a CPU. ONNX Runtime has no operators for bfloat16 there, and between its
operators for float16 it leaves out the rounding.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from actserve.core.errors import CaptureFailed

_aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)
_CELLS = {_aten.lstm, _aten.gru, _aten.rnn_tanh, _aten.rnn_relu}
_MOVING = {  # they only move elements: nothing to round
    _aten.alias, _aten.cat, _aten.chunk, _aten.clone, _aten.contiguous, _aten.detach, _aten.detach_, _aten.expand,
    _aten.flatten, _aten.index, _aten.index_select, _aten.gather, _aten.narrow, _aten.permute, _aten.relu,
    _aten.reshape, _aten.select, _aten.slice, _aten.split, _aten.squeeze, _aten.stack, _aten.t, _aten.transpose,
    _aten.unbind, _aten.unsqueeze, _aten.view,
}  # fmt: skip


def writes_in_place(program: torch.export.ExportedProgram) -> bool:
    """Whether the graph writes to tensors, and some are of 16 bits: a number and its copy in float32 become one."""
    nodes = list(program.graph.nodes)
    operators = [node.target for node in nodes if isinstance(node.target, torch._ops.OpOverload)]
    return any(each._schema.is_mutable for each in operators) and any(_half(node) is not None for node in nodes)


def compute_in_float32(module: fx.GraphModule) -> list[str]:
    """Hold float16 and bfloat16 as float32, and round every result of arithmetic.

    Inputs and outputs keep their dtype. Raises `CaptureFailed` for a cast that reads the bits of such a number.
    """
    graph = module.graph
    found = {dtype for node in graph.nodes if (dtype := _half(node)) is not None}
    if not found:
        return []
    for node in list(graph.nodes):
        if node.op == "output":
            _restore_outputs(graph, node)
        elif node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op == "get_attr" and _half(node) is not None:
            _widen_attribute(module, node)
        elif node.op in ("placeholder", "call_function"):
            _compute(graph, node)
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    return [f"{names} computed in float32 and rounded"]


def recurrent_in_float32(module: fx.GraphModule) -> list[str]:
    """`compute_in_float32` if a recurrent cell has numbers of 16 bits: compiled, it needs a CPU that has such cells."""
    cells = [node for node in module.graph.nodes if getattr(node.target, "overloadpacket", None) in _CELLS]
    return compute_in_float32(module) if any(_half(node.args[0]) is not None for node in cells) else []


def _compute(graph: fx.Graph, node: fx.Node) -> None:
    dtype = _half(node)
    if node.target is _aten.view.dtype and (dtype is not None or _half(node.args[0]) is not None):
        raise CaptureFailed(f"{node.target} reads the bits of a number of 16 bits, which an .onnx cannot")
    node.args = map_aggregate(node.args, _plain)
    node.kwargs = map_aggregate(node.kwargs, _plain)
    if dtype is None or getattr(node.target, "overloadpacket", None) in _MOVING:
        return
    rounded = node
    if node.op != "placeholder":
        with graph.inserting_after(node):
            rounded = graph.call_function(_aten.to.dtype, (node, dtype))
    with graph.inserting_after(rounded):
        result = graph.call_function(_aten.to.dtype, (rounded, torch.float32))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in (rounded, result))
    result.meta["half"] = dtype


def _plain(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in _HALVES else argument


def _widen_attribute(module: fx.GraphModule, node: fx.Node) -> None:
    path, _, name = str(node.target).rpartition(".")
    owner = module.get_submodule(path)
    tensor = getattr(owner, name)
    if tensor.dtype in _HALVES:  # several nodes can read one attribute
        wide = tensor.detach().float()
        if isinstance(tensor, torch.nn.Parameter):
            owner.register_parameter(name, torch.nn.Parameter(wide, tensor.requires_grad))
        elif name in owner._buffers:
            owner._buffers[name] = wide
        else:
            setattr(owner, name, wide)


def _restore_outputs(graph: fx.Graph, node: fx.Node) -> None:
    def restored(value: Any) -> Any:
        dtype = _half(value) if isinstance(value, fx.Node) else None
        if dtype is None:
            return value
        with graph.inserting_before(node):
            return graph.call_function(_aten.to.dtype, (value, dtype))

    node.args = map_aggregate(node.args, restored)


def _half(node: Any) -> torch.dtype | None:
    """The dtype of a node that gives a tensor of 16 bits; None for others, and for several tensors at once."""
    if not isinstance(node, fx.Node):
        return None
    if "half" in node.meta:
        found: torch.dtype = node.meta["half"]
        return found
    value = node.meta.get("val")
    if node.op == "get_attr" and value is None:
        value = _attribute(node)
    return value.dtype if isinstance(value, torch.Tensor) and value.dtype in _HALVES else None


def _attribute(node: fx.Node) -> Any:
    try:
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    except AttributeError:
        return None
