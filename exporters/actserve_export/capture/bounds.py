"""The bounds of inputs that a policy uses as an index: an embedding of 7 rows takes 0 to 6.

While the policy runs once under `IndexBounds`, each element of each input is followed through casts, reshapes, slices,
concatenations and the addition of constants, to the operators that take it as an index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical

from actserve.core.signature import SMALL_INTEGERS, Bound, TensorSpec

aten: Any = torch.ops.aten
# Operators that only move elements.
MOVING = {
    aten.alias, aten.as_strided, aten.cat, aten.clone, aten.concat, aten.contiguous, aten.detach, aten.expand,
    aten.flatten, aten.flip, aten.lift_fresh, aten.movedim, aten.narrow, aten.permute, aten.repeat, aten.reshape,
    aten.roll, aten.select, aten.slice, aten.split, aten.split_with_sizes, aten.squeeze, aten.stack, aten.t,
    aten.transpose, aten.unbind, aten.unflatten, aten.unsafe_chunk, aten.unsafe_split,
    aten.unsafe_split_with_sizes, aten.unsqueeze, aten._reshape_alias, aten._unsafe_view, aten.view,
}  # fmt: skip
CASTS = {aten._to_copy, aten.to}
_SHIFTS = {aten.add: 1, aten.add_: 1, aten.sub: -1, aten.sub_: -1}
# Operators on (tensor, axis, index): the index counts along the axis.
_ALONG_AXIS = {
    aten.gather, aten.index_select, aten.index_add, aten.index_copy, aten.index_fill, aten.scatter, aten.scatter_,
    aten.scatter_add, aten.scatter_add_, aten.scatter_reduce,
}  # fmt: skip
_EMBEDDINGS = {aten.embedding, aten._embedding_bag, aten._embedding_bag_forward_only}
_FREE = -1


@dataclass(frozen=True)
class _Elements:
    """The elements of a tensor: `source` numbers the input's element that each one is, and it is `offset` larger."""

    source: Tensor  # int64; _FREE: something else
    offset: Tensor  # float64


class IndexBounds(TorchDispatchMode):
    """Collects bounds while a policy runs. `watch` its inputs first; `found` gives the result."""

    def __init__(self) -> None:
        super().__init__()
        self._low: list[float | None] = []
        self._high: list[float | None] = []
        self._inputs: dict[str, range] = {}
        self._known: dict[Any, tuple[Tensor, _Elements | None]] = {}  # None: computed from inputs

    def watch(self, inputs: Mapping[str, Tensor]) -> None:
        """Follow the elements of `inputs`, (B, *shape) each."""
        for name, tensor in inputs.items():
            numbers = range(len(self._low), len(self._low) + tensor[0].numel())
            self._inputs[name] = numbers
            self._low += [None] * len(numbers)
            self._high += [None] * len(numbers)
            source = torch.arange(numbers.start, numbers.stop).reshape(1, *tensor.shape[1:])
            source = source.expand(tensor.shape).contiguous()
            self._remember(tensor, _Elements(source, torch.zeros(source.shape, dtype=torch.float64)))

    def found(self, name: str) -> tuple[Bound, Bound]:
        """The bounds of an input, (low, high)."""
        numbers = self._inputs[name]
        low, high = (bounds[numbers.start : numbers.stop] for bounds in (self._low, self._high))
        return _bound(low), _bound(high)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [self._of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(given):
            return result
        packet = func.overloadpacket
        self._note(packet, args, kwargs)
        try:
            after = self._moved(packet, func, args, kwargs)
        except RuntimeError:
            after = None
        if func._schema.is_mutable:
            self._forget(args[0])
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        unknown: list[_Elements | None] = [None] * len(tensors)
        for tensor, elements in zip(tensors, after or unknown, strict=True):
            self._remember(tensor, elements)
        return result

    def _remember(self, tensor: Tensor, elements: _Elements | None) -> None:
        self._known[_key(tensor)] = tensor, elements  # the tensor is kept, so that its memory is not used again

    def _forget(self, changed: Any) -> None:
        """A tensor is changed in place: its elements, and those of its views, are no longer the inputs'."""
        if isinstance(changed, Tensor):
            memory = _key(changed)[0]
            for key, (tensor, _) in self._known.items():
                if key[0] == memory:
                    self._known[key] = tensor, None

    def _of(self, value: Any) -> tuple[Tensor, _Elements | None] | None:
        return self._known.get(_key(value)) if isinstance(value, Tensor) else None

    def _elements(self, value: Any) -> _Elements | None:
        known = self._of(value)
        return None if known is None else known[1]

    def _moved(self, packet: Any, func: Any, args: Any, kwargs: Any) -> list[_Elements] | None:
        """The elements of the results, if the operator moves elements or adds constants to them."""
        if packet in CASTS and (elements := self._elements(args[0])) is not None:
            return [elements]
        if packet in MOVING:

            def part(value: Any, which: str) -> Any:
                if not isinstance(value, Tensor):
                    return value
                elements = self._elements(value)
                if elements is not None:
                    return getattr(elements, which)
                blank = torch.zeros(value.shape, dtype=torch.float64)
                return blank if which == "offset" else torch.full(value.shape, _FREE)

            parts = [
                tree_leaves(func(*tree_map(lambda x, w=which: part(x, w), args), **kwargs))
                for which in ("source", "offset")
            ]
            return [_Elements(source, offset) for source, offset in zip(*parts, strict=True)]
        if packet in _SHIFTS and len(args) == 2 and kwargs.get("alpha", 1) == 1:
            elements, other = self._elements(args[0]), args[1]
            if elements is None and packet is aten.add:
                elements, other = self._elements(args[1]), args[0]
            if elements is None or self._of(other) is not None:
                return None
            offset = elements.offset + _SHIFTS[packet] * torch.as_tensor(other, dtype=torch.float64)
            return [_Elements(elements.source.expand(offset.shape), offset)]
        return None

    def _note(self, packet: Any, args: Any, kwargs: Any) -> None:
        """Note the bounds of the indices that an operator takes."""
        if packet in _EMBEDDINGS:
            self._bound(args[1], 0, len(args[0]) - 1)
        elif packet in _ALONG_AXIS and len(args) > 2 and args[0].ndim:
            self._bound(args[2], 0, args[0].shape[args[1]] - 1)
        elif packet in (aten.index, aten.index_put, aten.index_put_):
            for axis, index in enumerate(args[1]):
                if isinstance(index, Tensor) and index.dtype not in (torch.bool, torch.uint8):
                    self._bound(index, -args[0].shape[axis], args[0].shape[axis] - 1)
        elif packet is aten.take:
            self._bound(args[1], -args[0].numel(), args[0].numel() - 1)

    def _bound(self, index: Any, low: int, high: int) -> None:
        elements = self._elements(index)
        if elements is None:
            return
        pairs = torch.stack([elements.source.reshape(-1).double(), elements.offset.reshape(-1)], 1).unique(dim=0)
        for source, offset in pairs.tolist():
            if source != _FREE:
                number = int(source)
                self._low[number] = max(low - offset, -float("inf") if (was := self._low[number]) is None else was)
                self._high[number] = min(high - offset, float("inf") if (was := self._high[number]) is None else was)


def narrowed(spec: TensorSpec, low: Bound, high: Bound) -> TensorSpec:
    """`spec` with these bounds, too, except those that its dtype implies. Contradictory bounds are left out."""
    sizes = {len(bound) for bound in (low, high) if isinstance(bound, tuple)}
    if spec.dtype == "bool" or (low is None and high is None) or sizes - {math.prod(spec.shape)}:
        return spec
    other = replace(spec, low=low, high=high)
    least, most = np.maximum(spec.each_low, other.each_low), np.minimum(spec.each_high, other.each_high)
    if spec.dtype in SMALL_INTEGERS:
        low_limit, high_limit = spec.limits
        least, most = np.where(least <= low_limit, -np.inf, least), np.where(most >= high_limit, np.inf, most)
    if (least > most).any():
        return spec
    return replace(spec, low=_bound(_numbers(least, spec.shape)), high=_bound(_numbers(most, spec.shape)))


def _numbers(bound: Any, shape: tuple[int, ...]) -> list[float | None]:
    flat = np.broadcast_to(bound, shape).reshape(-1).tolist()
    return [None if np.isinf(value) else float(value) for value in flat]


def spec_bounds(spec: Any, key: Any) -> tuple[Bound, Bound]:
    """The bounds (low, high) that a spec of TorchRL states for the integers at `key`, or None each.

    `spec` is of all observations, or of the only one.
    """
    if isinstance(spec, Composite):
        spec = spec[key] if key in spec.keys(True) else None
    if isinstance(spec, MultiCategorical):
        return 0.0, tuple(float(count) - 1 for count in spec.nvec.reshape(-1).tolist())
    if isinstance(spec, Categorical):
        return 0.0, float(spec.space.n) - 1
    if isinstance(spec, Bounded) and not spec.dtype.is_floating_point:
        return tuple(map(float, spec.low.reshape(-1))), tuple(map(float, spec.high.reshape(-1)))
    return None, None


def _key(tensor: Tensor) -> Any:
    """Equal for two tensors that are the same elements of the same memory: a tensor may be wrapped anew."""
    storage = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)
    return storage, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def _bound(values: list[float | None]) -> Bound:
    """One number for all elements if they have the same, or None."""
    return tuple(values) if len(set(values)) > 1 else values[0] if values else None
