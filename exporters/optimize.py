"""Rewrites of the exported graph that make a program faster and keep its answers.

For ONNX Runtime, which runs the operations one by one, measured with `python -m tests.benchmarks.programs` and its
forerunners (one thread, µs a frame at batch 1 / 8 / 32, all in one run on a busy machine):

    the tutorial's graph: convert, transpose, resize, greyscale        187 / 152 / 293
    rows, then columns picked as bytes; then scale and greyscale       162 / 114 / 115 to 170
    rows picked; columns, scale and greyscale in one small product     147 /  98 /  92    <- what is done here
    the network alone, on frames prepared before                       131 /  75 /  76

Tried, and slower than the second line: greyscale as a 1x1 convolution (174 / 139 / 263) or as a product with one column
(162 / 114 / 170), greyscale folded into a first convolution with three channels (172 / 126 / 178, it triples the
largest layer's work), greyscale before columns (169 / 129 / 185), columns picked from planes, byte by byte (200 / 165 /
221).

AOTInductor needs none of that: it fuses everything before the first convolution into one loop over the pixels that are
wanted. Picked first, its programs are slower (323 / 204 / 218 before, 335 / 221 / 243 after), and the product doubles
their time. So a `.pt2` gets the tidying alone.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
WIDEST_PRODUCT = 256  # rows of the matrix that picks columns; beyond, multiplying by its zeros costs more than it saves

_UPSAMPLE = (_aten.upsample_nearest2d.vec, _aten.upsample_nearest2d.default)
_ALIKE = (_aten.relu.default, _aten.neg.default, _aten.abs.default, _aten.clone.default)  # elementwise, one argument
_SCALED = (_aten.div.Tensor, _aten.mul.Tensor, _aten.add.Tensor, _aten.sub.Tensor)  # elementwise with a number
_TO_DTYPE = (_aten.to.dtype, _aten._to_copy.default)


def optimize(
    program: torch.export.ExportedProgram, runtime: str = "onnx"
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """A program that gives the same answers faster in `runtime`, and what was done to it, for the manifest.

    Values may move by float rounding (about 1e-7), which the certificate has to accept. The symbolic batch axis, the
    inputs and the outputs stay as they are. Where nothing applies, or the result cannot be exported again, the program
    itself is returned with an empty list.
    """
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        return program, []  # what a graph changes in place can be neither shared nor dropped
    module = program.module(check_guards=False)
    applied: list[str] = []
    for rewrite in (_tidy, _share, _drop, *_REWRITES[runtime]):
        applied += rewrite(module)
    if not applied:
        return program, []
    _drop(module)  # what the rewrites put out of use
    module.graph.lint()
    module.recompile()
    again = _export(module, program)
    return (program, []) if again is None else (again, applied)


def _export(module: fx.GraphModule, program: torch.export.ExportedProgram) -> torch.export.ExportedProgram | None:
    """The module exported with the inputs and the symbolic axes of `program`; None if that does not work out."""
    args, kwargs = program.example_inputs
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = torch.export.export(module, args, kwargs, dynamic_shapes=_symbolic_axes(program), strict=False)
    except Exception:  # torch.export raises a dozen types, with no common base; the program at hand will do
        return None
    before, after = program.graph_signature, again.graph_signature
    same = before.user_inputs == after.user_inputs and len(before.user_outputs) == len(after.user_outputs)
    return again if same and _ranges(again) == _ranges(program) else None


def _symbolic_axes(program: torch.export.ExportedProgram) -> tuple[dict[int, Any], ...]:
    dims: dict[str, Any] = {}

    def dim(size: Any) -> Any:
        bounds = program.range_constraints[size.node.expr]
        return dims.setdefault(str(size), torch.export.Dim(str(size), min=int(bounds.lower), max=int(bounds.upper)))

    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return tuple(
        {axis: dim(size) for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)} for value in values
    )


def _ranges(program: torch.export.ExportedProgram) -> list[tuple[int, int]]:
    return sorted((int(bounds.lower), int(bounds.upper)) for bounds in program.range_constraints.values())


# --- tidying ---------------------------------------------------------------------------------------------------------


def _tidy(module: fx.GraphModule) -> list[str]:
    """Remove assertions about what is known, and conversions of tensors that have the type already."""
    removed = 0
    for node in list(module.graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)  # comes back with every conversion that stays: not worth a mention
        elif node.target is _aten.to.dtype and len(node.args) == 2 and _value(node.args[0]).dtype == node.args[1]:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            removed += 1
    return [f"remove conversions that change nothing: {removed}"] if removed else []


def _share(module: fx.GraphModule) -> list[str]:
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


def _drop(module: fx.GraphModule) -> list[str]:
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


# --- picking before converting ---------------------------------------------------------------------------------------


@dataclass
class _Chain:
    """How a picture came from `source`: elementwise steps and permutations, the earliest first."""

    source: fx.Node
    steps: list[fx.Node]
    axes: list[int]  # of the picture, as axes of the source
    factor: float | None = 1.0  # the picture is the source times this, as float32; None: it is something else


@dataclass
class _Blend:
    """A weighted sum of the channels of a picture: greyscale, usually."""

    result: fx.Node
    weights: dict[int, float] = field(default_factory=dict)


def _pick_first(module: fx.GraphModule) -> list[str]:
    """Take the pixels that a nearest-neighbour resize keeps from the bytes, before anything is computed with them.

    Exact, because an elementwise step gives for a picked pixel what it gives for that pixel among others.
    """
    applied: list[str] = []
    for node in list(module.graph.nodes):
        if node.target in _UPSAMPLE and (chain := _trace(node.args[0])) is not None:
            applied += _pick(module, node, chain)
    return applied


def _trace(picture: fx.Node) -> _Chain | None:
    """Follow a picture back to the integers that it was converted from, through steps that a pick may overtake."""
    steps: list[fx.Node] = []
    node = picture
    while len(node.users) == 1 and _is_step(node):
        steps.insert(0, node)
        node = node.args[0]
    source, value = node, node.meta.get("val")  # a step of an earlier rewrite has none: there is nothing to gain then
    if not steps or value is None or value.dtype.is_floating_point or value.dtype.is_complex:
        return None  # nothing is converted after all: little to gain
    axes = list(range(value.dim()))
    factor: float | None = 1.0
    for step in steps:
        if step.target is _aten.permute.default:
            axes = [axes[axis] for axis in step.args[1]]
        elif factor is None or _value(step).dtype != torch.float32:
            factor = None
        elif step.target is _aten.div.Tensor:
            factor /= step.args[1]
        elif step.target is _aten.mul.Tensor:
            factor *= step.args[1]
        elif step.target not in _TO_DTYPE:
            factor = None
    return _Chain(source, steps, axes, factor)


def _is_step(node: fx.Node) -> bool:
    if "val" not in node.meta:
        return False
    if node.target in _SCALED:
        return isinstance(node.args[1], (int, float)) and not node.kwargs
    if node.target in _TO_DTYPE:
        return not set(node.kwargs) - {"dtype"} and all(not isinstance(argument, fx.Node) for argument in node.args[1:])
    return node.target in _ALIKE or node.target is _aten.permute.default


def _pick(module: fx.GraphModule, resize: fx.Node, chain: _Chain) -> list[str]:
    *_, height, width = _value(resize.args[0]).shape
    if not isinstance(height, int) or not isinstance(width, int):
        return []
    rows, columns = _kept(resize, height, width)
    if len(rows) > height or len(columns) > width:
        return []  # it enlarges: there is less to compute before than after
    name = f"pick pixels before converting them: {height}x{width} -> {len(rows)}x{len(columns)}"
    insert = _Inserter(module, resize)
    picked = insert(_aten.index_select.default, chain.source, chain.axes[-2], insert.constant("rows", rows))
    blend = _blend(resize) if chain.factor is not None and len(chain.axes) == 4 else None
    # (B, rows, width, channels): a line's pixels lie one after the other, the channels of each side by side
    if blend is not None and chain.axes == [0, 3, 1, 2]:
        weights = torch.zeros(_value(resize).shape[1], dtype=torch.float64)
        for channel, weight in blend.weights.items():
            weights[channel] = weight
        matrix = _picking(columns, width, weights * (chain.factor or 0.0))
        if matrix is not None:
            product = _multiply(insert, picked, matrix)
            grey = insert(_aten.reshape.default, product, [-1, len(rows), len(columns)])
            blend.result.replace_all_uses_with(grey)
            return [name, f"columns, scale and greyscale in one product: {matrix.shape[0]} -> {matrix.shape[1]}"]
    if chain.axes[-1] == len(chain.axes) - 1:  # planes: gathering single bytes costs more than it saves
        sizes = [len(rows), len(columns)]
        if resize.args[1] != sizes or any(scale is not None for scale in resize.args[2:]):
            return []  # given as a factor, it would shrink the rows again
        resize.replace_all_uses_with(insert(resize.target, _replay(insert, chain, picked), *resize.args[1:]))
        return [f"pick rows before converting them: {height} -> {len(rows)}"]
    picked = insert(_aten.index_select.default, picked, chain.axes[-1], insert.constant("columns", columns))
    resize.replace_all_uses_with(_replay(insert, chain, picked))
    return [name]


def _replay(insert: _Inserter, chain: _Chain, node: fx.Node) -> fx.Node:
    for step in chain.steps:
        node = insert(step.target, node, *step.args[1:], **step.kwargs)
    return node


def _multiply(insert: _Inserter, picked: fx.Node, matrix: Tensor) -> fx.Node:
    floats = insert(_aten.to.dtype, picked, torch.float32)
    blocks = insert(_aten.reshape.default, floats, [-1, matrix.shape[0]])
    return insert(_aten.mm.default, blocks, insert.constant("picking", matrix))


def _kept(resize: fx.Node, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The rows and columns that `resize` keeps: not from a formula, but from resizing a picture of its coordinates."""

    def resized(picture: Tensor) -> Tensor:
        return resize.target(picture[None, None].contiguous(), *resize.args[1:], **resize.kwargs)[0, 0].long()

    rows = resized(torch.arange(height, dtype=torch.float32)[:, None].expand(height, width))
    columns = resized(torch.arange(width, dtype=torch.float32).expand(height, width))
    return rows[:, 0].contiguous(), columns[0].contiguous()


def _picking(columns: Tensor, width: int, weights: Tensor) -> Tensor | None:
    """The matrix that takes a block of a line's values to the block of `columns` in it, channels weighed and summed.

    Columns repeat with a period: every 40 columns of 160 give 21 of 84. None if the period is too long to pay.
    """
    blocks = math.gcd(width, len(columns))
    before, after = width // blocks, len(columns) // blocks
    offsets = torch.arange(len(columns)) // after * before
    if before * len(weights) > WIDEST_PRODUCT or not torch.equal(columns, columns[:after].repeat(blocks) + offsets):
        return None
    matrix = torch.zeros(before, len(weights), after, dtype=torch.float64)
    matrix[columns[:after], :, torch.arange(after)] = weights
    return matrix.reshape(before * len(weights), after).float()


def _blend(resize: fx.Node) -> _Blend | None:
    """The one weighted sum of channels that everything after `resize` uses of it, or None."""
    if len(resize.users) != 1:
        return None
    (unbind,) = resize.users
    if unbind.target is not _aten.unbind.int or (unbind.args[1] if len(unbind.args) > 1 else 0) not in (1, -3):
        return None
    sums: dict[fx.Node, dict[int, float]] = {}
    for channel in unbind.users:
        if channel.target is not operator.getitem:
            return None
        sums[channel] = {channel.args[1]: 1.0}
    inside = set(sums)
    pending = list(sums)
    while pending:
        node = pending.pop(0)
        for user in node.users:
            if user not in sums and (weights := _weigh(user, sums)) is not None:
                sums[user] = weights
                pending.append(user)
    # the last sum: the one that nothing else was made of, and beside which nothing leaks out
    ends = [node for node in sums if node not in inside and all(user not in sums for user in node.users)]
    if len(ends) != 1 or any(user not in sums for node in sums if node is not ends[0] for user in node.users):
        return None
    return _Blend(ends[0], sums[ends[0]])


def _weigh(node: fx.Node, sums: dict[fx.Node, dict[int, float]]) -> dict[int, float] | None:
    """The weights of `node` as a sum of channels, if it is one made of nodes that are."""
    if node.op != "call_function" or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if node.target is _aten.add.Tensor and first in sums and second in sums:
        return {key: sums[first].get(key, 0.0) + sums[second].get(key, 0.0) for key in sums[first] | sums[second]}
    if first in sums and isinstance(second, (int, float)):
        if node.target is _aten.mul.Tensor:
            return {key: weight * second for key, weight in sums[first].items()}
        if node.target is _aten.div.Tensor:
            return {key: weight / second for key, weight in sums[first].items()}
    return None


class _Inserter:
    """Adds nodes and constants before a node, with the values that say their shapes."""

    def __init__(self, module: fx.GraphModule, before: fx.Node) -> None:
        self.module = module
        self.before = before

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.module.graph.inserting_before(self.before):
            return self.module.graph.call_function(target, args, kwargs)

    def constant(self, name: str, tensor: Tensor) -> fx.Node:
        number = 0
        while hasattr(self.module, f"{name}_{number}"):
            number += 1
        self.module.register_buffer(f"{name}_{number}", tensor)
        with self.module.graph.inserting_before(self.before):
            return self.module.graph.get_attr(f"{name}_{number}")


def _value(node: Any) -> Any:
    """What torch.export knows of a node's tensor: dtype and shape. Only asked of nodes that the export made."""
    return node.meta["val"]


_REWRITES: dict[str, tuple[Callable[[fx.GraphModule], list[str]], ...]] = {"onnx": (_pick_first,), "pt2": ()}
