"""Graph rewrites that any runtime gains by: what is known is not checked, nothing is computed twice or for nobody."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def tidy(module: fx.GraphModule) -> list[str]:
    """Remove assertions about what is known, and conversions of tensors that have the type already."""
    removed = 0
    for node in list(module.graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)  # comes back with every conversion that stays: not worth a mention
        elif node.target is _aten.to.dtype and len(node.args) == 2 and node.args[0].meta["val"].dtype == node.args[1]:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            removed += 1
    return [f"remove conversions that change nothing: {removed}"] if removed else []


def share(module: fx.GraphModule) -> list[str]:
    """Compute only once what is computed twice from the same things."""
    if any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in module.graph.nodes
    ):
        return []  # what is written to must not be what somebody else reads
    seen: dict[Any, fx.Node] = {}
    shared = 0
    for node in list(module.graph.nodes):
        if not (_is_pure(node) or node.op == "get_attr"):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
            shared += node.op == "call_function"
    return [f"share what is computed twice: {shared}"] if shared else []


def drop(module: fx.GraphModule) -> list[str]:
    """Remove what no output needs. Inputs stay, needed or not: they are the signature."""
    dropped = 0
    for node in reversed(list(module.graph.nodes)):
        if not node.users and (_is_pure(node) or node.op == "get_attr"):
            dropped += node.op == "call_function"
            module.graph.erase_node(node)
    return [f"drop what no output needs: {dropped}"] if dropped else []


def _is_pure(node: fx.Node) -> bool:
    """Does it always give the same from the same, and nothing else? Not: random numbers, writes, checks."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema, tags = node.target._schema, node.target.tags
    return not schema.is_mutable and torch.Tag.nondeterministic_seeded not in tags and bool(schema.returns)


def _frozen(argument: Any) -> Any:
    """An argument as something hashable that tells 1 from 1.0 and True."""
    if isinstance(argument, (list, tuple)):
        return tuple(_frozen(item) for item in argument)
    if isinstance(argument, dict):
        return tuple(sorted((name, _frozen(item)) for name, item in argument.items()))
    return argument if isinstance(argument, fx.Node) else (type(argument).__name__, repr(argument))
