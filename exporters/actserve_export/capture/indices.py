"""Negative indices: torch refuses most of them, and the programs would count them from the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from actserve.core.signature import Signature
from actserve_export.capture.bounds import CASTS, MOVING

aten: Any = torch.ops.aten
# Operators on (tensor, axis, index) that refuse a negative index.
_ALONG_AXIS = {
    aten.gather.default, aten.index_select.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default,
}  # fmt: skip
_POSITIONS = {aten.arange, aten.argmax, aten.argmin, aten.argsort}
_UNSIGNED = (torch.bool, torch.uint8)


def refuse_negative_indices(program: ExportedProgram, signature: Signature) -> None:
    """Change `program` so that an index below 0 becomes one behind the end, which both programs refuse.

    An index that comes from an input with a lower bound, or from an argmax, is left as it is.
    """
    names = dict(zip(program.graph_signature.user_inputs, signature.inputs, strict=True))
    bounded = {name for name, spec in names.items() if (spec.each_low >= 0).all()}
    for node in program.graph.nodes:  # torch.export can leave a node out of the users of its arguments
        for argument in node.all_input_nodes:
            argument.users.setdefault(node)
    for node in list(program.graph.nodes):
        if node.target is aten.embedding.default:
            axis, place = 0, 1
        elif node.target in _ALONG_AXIS:
            axis, place = node.args[1], 2
        else:
            continue
        index, shape = node.args[place], node.args[0].meta["val"].shape
        size = shape[axis] if shape else 1
        if not isinstance(size, int) or _not_negative(index, bounded):
            continue
        with program.graph.inserting_before(node):
            below = program.graph.call_function(aten.lt.Scalar, (index, 0))
            below.meta["val"] = index.meta["val"] < 0
            checked = program.graph.call_function(aten.masked_fill.Scalar, (index, below, size))
            checked.meta["val"] = index.meta["val"].clone()
        node.update_arg(place, checked)
    program.graph_module.recompile()


def _not_negative(index: fx.Node, bounded: set[Any]) -> bool:
    """Whether all elements of `index` are known to be 0 or more."""
    if getattr(index.meta["val"], "dtype", None) in _UNSIGNED:
        return True
    if index.op == "placeholder":
        return index.name in bounded
    packet = getattr(index.target, "overloadpacket", index.target)
    if packet in _POSITIONS:
        return True
    return packet in MOVING | CASTS and all(_not_negative(node, bounded) for node in index.all_input_nodes)
