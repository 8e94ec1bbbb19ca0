"""The rewrite that folds batch normalisation into the layer before it.

In evaluation, a batch norm multiplies each channel with a number and adds another, as the layer's weights can. The
converter to ONNX folds them too. Folding first means that the `.onnx` and the stored program hold the same weights, so
that the store holds them once, and that the `.pt2` gains as well.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
BATCH_NORM = _aten.batch_norm.default
_LAYERS = {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.linear.default}


def fold_batch_norms(module: fx.GraphModule) -> list[str]:
    """Fold batch norms in evaluation mode, in place. Computed in float64 and rounded once."""
    graph = module.graph
    reads = Counter(str(node.target) for node in graph.nodes if node.op == "get_attr" for _ in node.users)
    folded = 0
    for norm in list(graph.nodes):
        if norm.target is not BATCH_NORM or (layer := _layer_before(norm)) is None:
            continue
        tensors = [_tensor(module, argument) for argument in (*_weights(layer), *norm.args[1:5])]
        weight, bias, scale, shift, mean, variance = tensors
        if weight is None or mean is None or variance is None or reads[layer.args[1].target] > 1:
            continue  # a weight that others read as well would be stored twice
        if any(tensor is not None and tensor.dtype != torch.float32 for tensor in tensors):
            continue
        factor = (variance.double() + norm.args[7]).rsqrt() * (1 if scale is None else scale.double())
        offset = (0 if bias is None else bias.double()) - mean.double()
        offset = offset * factor + (0 if shift is None else shift.double())
        factors = factor.reshape(-1, *[1] * (weight.dim() - 1))
        with graph.inserting_before(layer):
            new = [
                _constant(module, f"folded_{kind}_{folded}", tensor.float())
                for kind, tensor in (("weight", weight.double() * factors), ("bias", offset))
            ]
        layer.args = (layer.args[0], *new, *layer.args[3:])
        norm.replace_all_uses_with(layer)
        graph.erase_node(norm)
        folded += 1
    if folded:
        _remove_unread(module, set(reads))
    return [f"fold batch norms into the layers before them: {folded}"] if folded else []


def _remove_unread(module: fx.GraphModule, read_before: set[str]) -> None:
    """Remove the tensors that the graph no longer reads; an export would keep them."""
    module.graph.eliminate_dead_code()
    for target in read_before - {node.target for node in module.graph.nodes if node.op == "get_attr"}:
        owner, _, name = target.rpartition(".")
        delattr(module.get_submodule(owner), name)


def _layer_before(norm: fx.Node) -> Any:
    """The layer whose result only this batch norm reads, or None."""
    layer, training = norm.args[0], norm.args[5]
    if training or not isinstance(layer, fx.Node) or layer.target not in _LAYERS or len(layer.users) > 1:
        return None
    if layer.kwargs or norm.kwargs:
        return None
    if layer.target is _aten.linear.default and layer.meta["val"].dim() != 2:
        return None  # its channels are not its outputs
    return layer


def _weights(layer: fx.Node) -> tuple[Any, Any]:
    return layer.args[1], layer.args[2] if len(layer.args) > 2 else None


def _tensor(module: fx.GraphModule, argument: Any) -> Any:
    """The tensor that a node reads from the module; None for None and for computed tensors."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    found = operator.attrgetter(str(argument.target))(module)
    return found.detach() if isinstance(found, Tensor) else None


def _constant(module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    module.register_buffer(name, tensor.contiguous())
    return module.graph.get_attr(name)
