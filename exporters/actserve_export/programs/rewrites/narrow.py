"""The rewrite for bfloat16: layers with weights compute with 16 bits, everything between them with 32.

A bfloat16 number has the range of a float32 and 8 bits of precision. The products are summed in float32 (oneDNN), and
the sums are rounded once. Layers whose result reaches an output without another layer stay in float32: they decide
between actions that are nearly equal, and a rounded state would be rounded again with every step.
"""

from __future__ import annotations

import torch
from torch import fx

_aten = torch.ops.aten
_LAYERS = {  # the positions of tensors among the arguments
    _aten.conv1d.default: (0, 1, 2), _aten.conv2d.default: (0, 1, 2), _aten.conv3d.default: (0, 1, 2),
    _aten.convolution.default: (0, 1, 2), _aten.linear.default: (0, 1, 2), _aten.addmm.default: (0, 1, 2),
    _aten.mm.default: (0, 1), _aten.matmul.default: (0, 1), _aten.bmm.default: (0, 1), _aten.baddbmm.default: (0, 1, 2),
}  # fmt: skip
_MOVING = {  # of one tensor; rounding before or after them is the same
    _aten.clone.default, _aten.contiguous.default, _aten.flatten.using_ints, _aten.permute.default, _aten.relu.default,
    _aten.reshape.default, _aten.squeeze.dim, _aten.t.default, _aten.transpose.int, _aten.unsqueeze.default,
    _aten.view.default,
}  # fmt: skip


def layers_in_bfloat16(module: fx.GraphModule, wide: int = 0) -> list[str]:
    """Narrow the layers of a graph, in place, but not the first `wide` ones.

    Inputs, outputs and state keep their dtype. Returns no name if no layer is left.
    """
    graph = module.graph
    layers = [node for node in graph.nodes if node.target in _LAYERS and _has_weights(node) and _is_float32(node)]
    reaching = _reaching(graph, layers)
    narrowed = [node for node in layers if node in reaching][wide:]
    for node in narrowed:
        arguments = list(node.args)
        with graph.inserting_before(node):
            for position in _LAYERS[node.target]:
                if position < len(arguments) and isinstance(arguments[position], fx.Node):
                    arguments[position] = _converted(graph, arguments[position], torch.bfloat16)
        node.args = tuple(arguments)
        _widen_after(graph, node)
    for node in list(graph.nodes):
        _sink(graph, node)
    for node in list(graph.nodes):
        if _is_conversion(node, torch.bfloat16) and _is_conversion(node.args[0], torch.float32):
            node.replace_all_uses_with(node.args[0].args[0])
    if not narrowed:
        return []
    return [f"bfloat16: {len(narrowed)} of {len(layers)} layers with weights"]


def _reaching(graph: fx.Graph, layers: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose result reaches one of `layers`."""
    wanted, found = set(layers), set[fx.Node]()
    for node in reversed(list(graph.nodes)):
        if any(user in wanted or user in found for user in node.users):
            found.add(node)
    return found


def _has_weights(layer: fx.Node) -> bool:
    """Whether one of the factors is a constant, moved at most."""
    factors = [layer.args[position] for position in _LAYERS[layer.target][-2:] if position < len(layer.args)]
    for factor in factors:
        while isinstance(factor, fx.Node) and factor.target in _MOVING:
            factor = factor.args[0]
        if isinstance(factor, fx.Node) and factor.op == "get_attr":
            return True
    return False


def _is_float32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _converted(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return graph.call_function(_aten.to.dtype, (node, dtype))


def _is_conversion(node: object, dtype: torch.dtype) -> bool:
    return isinstance(node, fx.Node) and node.target is _aten.to.dtype and node.args[1] is dtype


def _widen_after(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_after(node):
        wide = _converted(graph, node, torch.float32)
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    wide.meta["widened"] = True


def _sink(graph: fx.Graph, node: fx.Node) -> None:
    """Move a conversion that `_widen_after` inserted below the operators that only move its elements."""
    while "widened" in node.meta and len(node.users) == 1:
        (user,) = node.users
        if user.target not in _MOVING or user.args[0] is not node:
            return
        user.args = (node.args[0], *user.args[1:])
        graph.erase_node(node)
        _widen_after(graph, user)
        (node,) = user.users
