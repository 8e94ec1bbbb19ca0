"""The arguments of an operator in a traced graph."""

from __future__ import annotations

from typing import Any

from torch import fx


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an operator of torch, by name, with defaults."""
    declared = node.target._schema.arguments
    values: dict[str, Any] = {argument.name: argument.default_value for argument in declared}
    values.update({argument.name: value for argument, value in zip(declared, node.args, strict=False)})
    values.update(node.kwargs)
    return values
