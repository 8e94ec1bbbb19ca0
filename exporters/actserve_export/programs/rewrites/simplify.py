"""Rewrites that every runtime gains by: no redundant conversions, no repeated computation, no dead code.

Torch's own `CSEPass` is no replacement for `merge_common_subexpressions`: it takes `x + 1` and `x + 1.0` for the same
expression, and gives a uint8 result for both where x is uint8 (torch 2.13). It also bans random operations from a list
that lacks some, and keeps a second node for the same weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def remove_redundant_conversions(module: fx.GraphModule) -> list[str]:
    """Remove conversions of tensors that have the type already, and assertions of types and devices."""
    removed = 0
    for node in list(module.graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)  # not counted: exporting again adds one for every conversion that stays
        elif node.target is _aten.to.dtype and len(node.args) == 2 and node.args[0].meta["val"].dtype == node.args[1]:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            removed += 1
    return [f"remove conversions that change nothing: {removed}"] if removed else []


def merge_common_subexpressions(module: fx.GraphModule) -> list[str]:
    """Compute equal expressions once. A graph that writes to a tensor stays as it is: readers must not share it."""
    if any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in module.graph.nodes
    ):
        return []
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "get_attr") or node.is_impure():  # impure: random numbers, checks
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
            merged += node.op == "call_function"
    return [f"share what is computed twice: {merged}"] if merged else []


def remove_dead_code(module: fx.GraphModule) -> list[str]:
    """Remove operations that no output needs. All inputs stay: they are the signature."""
    before = _count_operations(module)
    module.graph.eliminate_dead_code()
    removed = before - _count_operations(module)
    return [f"drop what no output needs: {removed}"] if removed else []


def _count_operations(module: fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in module.graph.nodes)


def _hashable(argument: Any) -> Any:
    """A hashable form of an argument that tells 1 from 1.0 and True."""
    if isinstance(argument, (list, tuple)):
        return tuple(_hashable(item) for item in argument)
    if isinstance(argument, dict):
        return tuple(sorted((name, _hashable(item)) for name, item in argument.items()))
    return argument if isinstance(argument, fx.Node) else (type(argument).__name__, repr(argument))
