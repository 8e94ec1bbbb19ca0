"""The rewrite for ONNX Runtime: pick the pixels that a nearest-neighbour resize keeps before converting the screen.

ONNX Runtime runs the operations one by one. Measured with `python -m tests.benchmarks.programs` and its
predecessors (one thread, µs per frame at batch 1 / 8 / 32, all in one run on a busy machine):

    the tutorial's graph: convert, transpose, resize, greyscale        187 / 152 / 293
    rows, then columns picked as bytes; then scale and greyscale       162 / 114 / 115 to 170
    rows picked; columns, scale and greyscale in one small product     147 /  98 /  92    <- this rewrite
    the network alone, on prepared frames                              131 /  75 /  76

Other variants were slower than the second line: greyscale as a 1x1 convolution (174 / 139 / 263) or as a product with
one column (162 / 114 / 170); greyscale folded into a first convolution with three channels (172 / 126 / 178, because it
triples the work of the largest layer); greyscale before columns (169 / 129 / 185); columns picked from planes, byte by
byte (200 / 165 / 221).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
WIDEST_PRODUCT = (
    256  # rows of the matrix that picks columns; with more, the products with its zeros cost more than they save
)

_UPSAMPLE = (_aten.upsample_nearest2d.vec, _aten.upsample_nearest2d.default)
_ALIKE = (_aten.relu.default, _aten.neg.default, _aten.abs.default, _aten.clone.default)  # elementwise, one argument
_SCALED = (_aten.div.Tensor, _aten.mul.Tensor, _aten.add.Tensor, _aten.sub.Tensor)  # elementwise with a number
_TO_DTYPE = (_aten.to.dtype, _aten._to_copy.default)


@dataclass
class _ResizeChain:
    """The elementwise steps and permutations from `source` to a picture, in order."""

    source: fx.Node
    steps: list[fx.Node]
    axes: list[int]  # the source's axis for each axis of the picture
    factor: float | None = 1.0  # picture = source * factor, in float32; None: another function


@dataclass
class _Blend:
    """A weighted sum of the channels of a picture: greyscale, usually."""

    result: fx.Node
    weights: dict[int, float] = field(default_factory=dict)


def pick_pixels_first(module: fx.GraphModule) -> list[str]:
    """Move the picking of pixels by a nearest-neighbour resize before the elementwise steps.

    The result is exactly the same, because elementwise steps treat each pixel alone.
    """
    applied: list[str] = []
    for node in list(module.graph.nodes):
        if node.target in _UPSAMPLE and (chain := _trace(node.args[0])) is not None:
            applied += _pick(module, node, chain)
    return applied


def _trace(picture: fx.Node) -> _ResizeChain | None:
    """The chain from a picture back to the integers that it was converted from, through elementwise steps."""
    steps: list[fx.Node] = []
    node = picture
    while len(node.users) == 1 and _is_step(node):
        steps.insert(0, node)
        node = node.args[0]
    source, value = node, node.meta.get("val")  # a node of an earlier rewrite has none
    if not steps or value is None or value.dtype.is_floating_point or value.dtype.is_complex:
        return None  # no conversion: little to gain
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
    return _ResizeChain(source, steps, axes, factor)


def _is_step(node: fx.Node) -> bool:
    if "val" not in node.meta:
        return False
    if node.target in _SCALED:
        return isinstance(node.args[1], (int, float)) and not node.kwargs
    if node.target in _TO_DTYPE:
        return not set(node.kwargs) - {"dtype"} and all(not isinstance(argument, fx.Node) for argument in node.args[1:])
    return node.target in _ALIKE or node.target is _aten.permute.default


def _pick(module: fx.GraphModule, resize: fx.Node, chain: _ResizeChain) -> list[str]:
    *_, height, width = _value(resize.args[0]).shape
    if not isinstance(height, int) or not isinstance(width, int):
        return []
    rows, columns = _kept(resize, height, width)
    if len(rows) > height or len(columns) > width:
        return []  # enlarging: there are fewer pixels before it than after
    name = f"pick pixels before converting them: {height}x{width} -> {len(rows)}x{len(columns)}"
    insert = _Inserter(module, resize)
    picked = insert(_aten.index_select.default, chain.source, chain.axes[-2], insert.constant("rows", rows))
    blend = _blend(resize) if chain.factor is not None and len(chain.axes) == 4 else None
    # (B, rows, width, channels): the pixels of a row are contiguous, and so are the channels of a pixel
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
    if chain.axes[-1] == len(chain.axes) - 1:  # planes: gathering single bytes is too slow
        sizes = [len(rows), len(columns)]
        if resize.args[1] != sizes or any(scale is not None for scale in resize.args[2:]):
            return []  # a resize by factor would shrink the rows again
        resize.replace_all_uses_with(insert(resize.target, _replay(insert, chain, picked), *resize.args[1:]))
        return [f"pick rows before converting them: {height} -> {len(rows)}"]
    picked = insert(_aten.index_select.default, picked, chain.axes[-1], insert.constant("columns", columns))
    resize.replace_all_uses_with(_replay(insert, chain, picked))
    return [name]


def _replay(insert: _Inserter, chain: _ResizeChain, node: fx.Node) -> fx.Node:
    for step in chain.steps:
        node = insert(step.target, node, *step.args[1:], **step.kwargs)
    return node


def _multiply(insert: _Inserter, picked: fx.Node, matrix: Tensor) -> fx.Node:
    floats = insert(_aten.to.dtype, picked, torch.float32)
    blocks = insert(_aten.reshape.default, floats, [-1, matrix.shape[0]])
    return insert(_aten.mm.default, blocks, insert.constant("picking", matrix))


def _kept(resize: fx.Node, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The rows and columns that `resize` keeps, found by resizing a picture of coordinates."""

    def resized(picture: Tensor) -> Tensor:
        return resize.target(picture[None, None].contiguous(), *resize.args[1:], **resize.kwargs)[0, 0].long()

    rows = resized(torch.arange(height, dtype=torch.float32)[:, None].expand(height, width))
    columns = resized(torch.arange(width, dtype=torch.float32).expand(height, width))
    return rows[:, 0].contiguous(), columns[0].contiguous()


def _picking(columns: Tensor, width: int, weights: Tensor) -> Tensor | None:
    """The matrix from a block of a row's values to the kept `columns` of that block, a weighted sum of channels each.

    Columns repeat with a period: 40 columns of 160 give 21 of 84. None if the period is too long to be faster.
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
    """The weighted sum of channels, if it is all that the graph uses of `resize`, or None."""
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
    # The last sum: no other sum uses it, and nothing outside uses the others.
    ends = [node for node in sums if node not in inside and all(user not in sums for user in node.users)]
    if len(ends) != 1 or any(user not in sums for node in sums if node is not ends[0] for user in node.users):
        return None
    return _Blend(ends[0], sums[ends[0]])


def _weigh(node: fx.Node, sums: dict[fx.Node, dict[int, float]]) -> dict[int, float] | None:
    """The weights of the channels if `node` is a weighted sum of nodes in `sums`, or None."""
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
    """Adds nodes and constants before a node."""

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
    """The fake tensor of a node that torch.export made: dtype and shape."""
    return node.meta["val"]
