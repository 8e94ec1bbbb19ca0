"""TensorSpec and Signature: the inputs and outputs of a policy. All validation of arrays is here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from actserve.core.bfloat16 import LARGEST, narrow, widen
from actserve.core.errors import InvalidRequest, InvalidTensor, UnknownOutput
from actserve.core.limits import Limits

Array = NDArray[Any]
Arrays = dict[str, Array]  # by tensor name; the first axis is the batch
DType = Literal[
    "uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "bool"
]  # fmt: skip


SMALL_INTEGERS = ("uint8", "int8", "uint16", "int16")  # every value is as likely as another

Bound = float | tuple[float | None, ...] | None  # of the elements of a tensor; None: no bound


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor. `shape` is per item: the batch axis is never part of it.

    Bounds are inclusive. They hold for every element; a tuple has one for each element of an item, row-major.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    dtype: DType
    shape: tuple[int, ...]
    low: Bound = None
    high: Bound = None

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of arrays; float32 for bfloat16, which numpy lacks."""
        return np.dtype("float32" if self.dtype == "bfloat16" else self.dtype)

    @cached_property
    def wire_dtype(self) -> np.dtype[Any]:
        """The dtype of the bytes of a body, little-endian; uint16 for the halves of bfloat16."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype).newbyteorder("<")

    @cached_property
    def elements(self) -> int:
        """Elements of one item."""
        return math.prod(self.shape)

    @cached_property
    def item_bytes(self) -> int:
        """Bytes of one item in a body, row-major."""
        return self.elements * self.wire_dtype.itemsize

    def to_wire(self, array: Array) -> Array:
        """An array of any shape as a body holds it, of `wire_dtype`; the same array if it is that already."""
        halves = narrow(np.asarray(array, np.float32)) if self.dtype == "bfloat16" else array
        return halves.astype(self.wire_dtype, copy=False)

    def from_wire(self, array: Array) -> Array:
        """The inverse of `to_wire`, without a copy except for bfloat16."""
        return widen(array) if self.dtype == "bfloat16" else array

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest finite number of the dtype."""
        if self.dtype == "bfloat16":
            return -LARGEST, LARGEST
        found: Any = (np.iinfo if self.numpy_dtype.kind in "iu" else np.finfo)(self.numpy_dtype)
        return found.min, found.max

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    def validate(self, batch: Array) -> None:
        """Raise `InvalidTensor` unless `batch` is (B, *shape) of this dtype, in row-major order and in bounds."""
        if batch.dtype != self.numpy_dtype or batch.shape[1:] != self.shape or batch.ndim != len(self.shape) + 1:
            held = " as float32" * (self.dtype == "bfloat16")
            raise InvalidTensor(self.name, f"{self.dtype}[B, {', '.join(map(str, self.shape))}]{held}", describe(batch))
        if not batch.flags.c_contiguous:
            raise InvalidTensor(self.name, "a row-major (C-contiguous) array", f"strides {batch.strides}")
        if self.numpy_dtype.kind == "f" and _has_nan(batch):
            raise InvalidTensor(self.name, "numbers", "NaN")
        if self.low is not None and batch.size:
            self._refuse(batch, batch < self.each_low, self.low, "at least")
        if self.high is not None and batch.size:
            self._refuse(batch, batch > self.each_high, self.high, "at most")

    @cached_property
    def each_low(self) -> Array:
        """The lower bound: one number, or one for each element, (*shape); -inf: none."""
        return self._each(self.low, -np.inf)

    @cached_property
    def each_high(self) -> Array:
        return self._each(self.high, np.inf)

    def _each(self, bound: Bound, default: float) -> Array:
        """A bound of every element: one number, or (*shape)."""
        values = bound if isinstance(bound, tuple) else (bound,)
        array = np.array([default if value is None else value for value in values], np.float64)
        return array.reshape(self.shape if isinstance(bound, tuple) else ())

    def _refuse(self, batch: Array, wrong: Array, bound: Bound, relation: str) -> None:
        """Raise `InvalidTensor` for the first value that is `wrong`, if there is one."""
        if not wrong.any():
            return
        item, *place = (int(index) for index in np.argwhere(wrong)[0])
        each = self._each(bound, np.nan)
        limit = float(np.broadcast_to(each, self.shape)[tuple(place)])
        where = f" at {place}" if isinstance(bound, tuple) else ""
        raise InvalidTensor(self.name, f"values of {relation} {_number(limit)}{where}", f"{batch[(item, *place)]}")

    @property
    def range(self) -> str:
        """The bounds for people: "0 to 6", or "0 to 2, 0 to 4" for two elements; empty without bounds."""
        if self.low is None and self.high is None:
            return ""
        count = max(len(bound) if isinstance(bound, tuple) else 1 for bound in (self.low, self.high))
        lows, highs = (bound if isinstance(bound, tuple) else (bound,) * count for bound in (self.low, self.high))
        pairs = [_range(low, high) for low, high in zip(lows, highs, strict=True)]
        return ", ".join(pairs[:8]) + (", …" if len(pairs) > 8 else "")

    def zeros(self, batch: int) -> Array:
        """(batch, *shape) of zeros."""
        return np.zeros((batch, *self.shape), self.numpy_dtype)

    def sample(self, rng: np.random.Generator, batch: int) -> Array:
        """(batch, *shape) of random values that `validate` accepts: uniform within bounds, normal without."""
        shape = (batch, *self.shape)
        if self.dtype == "bool":
            return rng.random(shape) < 0.5
        if self.numpy_dtype.kind == "f" and self.low is None and self.high is None:
            return self._rounded(rng.standard_normal(shape))
        low, high = self._sampling_range()
        if self.numpy_dtype.kind == "f":
            return self._rounded(rng.uniform(low, high, shape))
        whole = (np.ceil(low).astype(np.int64), np.floor(high).astype(np.int64))
        return rng.integers(*whole, shape, self.numpy_dtype, endpoint=True)

    def _rounded(self, values: Array) -> Array:
        """`values` in the dtype."""
        return self.from_wire(self.to_wire(values.astype(self.numpy_dtype)))

    def blank(self, batch: int) -> Array:
        """(batch, *shape) of zeros, or of the valid values nearest to zero."""
        nearest = np.clip(0, self.each_low, self.each_high)
        return np.array(np.broadcast_to(nearest, (batch, *self.shape)), self.numpy_dtype, order="C")  # writable

    def _sampling_range(self) -> tuple[Array, Array]:
        low, high = self.limits if self.dtype in SMALL_INTEGERS else (-100.0, 100.0)
        least, most = self.each_low, self.each_high
        return (
            np.where(np.isfinite(least), least, np.minimum(low, most)),
            np.where(np.isfinite(most), most, np.maximum(high, least)),
        )


def _has_nan(array: Array) -> bool:
    """A scalar product is NaN if a factor is, and takes one call of numpy instead of two."""
    if array.dtype.itemsize < 4:
        return bool(np.isnan(array).any())
    flat = array.reshape(-1)
    return bool(np.isnan(flat.dot(flat)))


Distribution = Literal["uniform", "normal", "gumbel", "exponential"]
Exploration = Literal["deterministic", "random"]


@dataclass(frozen=True)
class State:
    """A recurrent tensor: the program's `output` of one step is its input `spec` of the next step."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    spec: TensorSpec  # the input
    output: str  # name of the output that replaces it
    initial: float | tuple[float, ...] = 0.0  # initial value of every element, or of each one, row-major

    def initial_value(self, batch: int) -> Array:
        """(batch, *shape): the state at the beginning of an episode."""
        one = np.reshape(self.initial, self.spec.shape) if isinstance(self.initial, tuple) else self.initial
        return np.full((batch, *self.spec.shape), one, self.spec.numpy_dtype)


@dataclass(frozen=True)
class Noise:
    """A random input. Its elements are independent samples of a standard distribution; uniform means [0, 1).

    `always`: it is drawn for deterministic actions, too, such as the latent state of a world model.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    spec: TensorSpec
    distribution: Distribution
    always: bool = False


@dataclass(frozen=True)
class Parameter:
    """A float32 number per item that a request may set, such as the epsilon of epsilon-greedy."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    default: float  # the value in training
    low: float
    high: float | None  # None: no bound

    @cached_property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, "float32", (), self.low, self.high)


@dataclass(frozen=True)
class Chunk:
    """An output that plans several actions ahead: its first axis is time, one control period a row.

    `execute` of them are taken before the next chunk replaces the rest. With `ensemble`, an action is the weighted mean
    of what all chunks plan for its time, with weights exp(-ensemble * i) for the i-th oldest chunk (Zhao et al. 2023,
    "Temporal Ensembling").
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    output: str
    execute: int
    period_s: float | None = None  # between two actions; None: not known
    ensemble: float | None = None


PREV_CHUNK = "prev_chunk_left_over"  # an observation of real-time chunking: what is left of the last chunk, then zeros
INFERENCE_DELAY = "inference_delay"  # another one: the periods that pass before the new chunk can be used

IS_INIT = TensorSpec("is_init", "bool", ())  # true on the first step of an episode: resets the state
EXPLORE = TensorSpec("explore", "bool", ())  # true: act randomly, as in training; false: deterministically


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a policy.

    A program takes `inputs` and returns `results`, in this order. A request needs only the observations;
    `actserve.core.completion` adds the other inputs.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    observations: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]  # the action first
    max_batch: int  # 1: the program takes one item at a time
    state: tuple[State, ...] = ()
    is_init: bool = False  # whether the program takes the reset flag
    exploration: tuple[Exploration, ...] = ("deterministic",)  # two modes: the program takes the flag `explore`
    parameters: tuple[Parameter, ...] = ()
    noise: tuple[Noise, ...] = ()
    chunk: Chunk | None = None
    limits: Limits | None = None  # what the program keeps to, whatever it is given

    @cached_property
    def request_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that a request may carry."""
        flags = (IS_INIT,) if self.is_init else ()
        parameters = tuple(parameter.spec for parameter in self.parameters)
        return (*self.observations, *(state.spec for state in self.state), *flags, *parameters)

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs of the program, in order."""
        flags = (EXPLORE,) if len(self.exploration) > 1 else ()
        return (*self.request_inputs, *flags, *(noise.spec for noise in self.noise))

    @cached_property
    def results(self) -> tuple[TensorSpec, ...]:
        """All outputs of the program, in order: the policy's outputs, then the new state."""
        return (*self.outputs, *(replace(state.spec, name=state.output) for state in self.state))

    @cached_property
    def graph_results(self) -> tuple[TensorSpec, ...]:
        """The results with their names in an .onnx graph, where no output has the name of an input."""
        taken = {spec.name for spec in self.inputs}
        return tuple(replace(spec, name=f"{spec.name}_out") if spec.name in taken else spec for spec in self.results)

    @cached_property
    def answers(self) -> tuple[TensorSpec, ...]:
        """What an answer can have: the outputs, and new state under the name of the input that it replaces."""
        return (*self.outputs, *(state.spec for state in self.state))

    @property
    def action(self) -> TensorSpec:
        return self.outputs[0]

    @cached_property
    def planned(self) -> TensorSpec:
        """The output that is a chunk, (horizon, *shape of an action). Raises `InvalidRequest` if there is none."""
        if self.chunk is None:
            raise InvalidRequest("expected a policy that plans chunks of actions; this one gives one action at a time")
        return next(spec for spec in self.outputs if spec.name == self.chunk.output)

    @cached_property
    def planned_action(self) -> TensorSpec:
        """One action of the chunk, (*shape). Raises as `planned`."""
        low, high = (None if isinstance(bound, tuple) else bound for bound in (self.planned.low, self.planned.high))
        return replace(self.planned, shape=self.planned.shape[1:], low=low, high=high)

    @cached_property
    def slows_chunks(self) -> bool:
        """Whether the limits bound the change between actions of chunks: then none of them may be left out."""
        limits = () if self.limits is None or self.chunk is None else self.limits.outputs
        return any(limit.change is not None and limit.output == self.planned.name for limit in limits)

    def draws(self, exploration: Exploration) -> bool:
        """Whether a request in this mode needs noise, and so a seed."""
        return any(noise.always or exploration == "random" for noise in self.noise)

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.outputs)

    def validate(self, batch: Mapping[str, Array]) -> int:
        """The size of `batch`, which holds all `inputs`. Raises `InvalidTensor`."""
        for name, array in batch.items():
            self._spec(name, self._inputs_by_name).validate(array)
        return _size(batch, self.inputs)

    def validate_request(self, tensors: Mapping[str, Array], values: bool = True) -> int:
        """The batch size of a request. It needs every observation, and either all state or none.

        Raises `InvalidTensor`. Without `values`, the shapes, dtypes and values are left to `validate`.
        """
        for name, array in tensors.items():
            spec = self._spec(name, self._request_inputs_by_name)
            if values:
                spec.validate(array)
        carried = any(state.spec.name in tensors for state in self.state)
        return _size(
            tensors, (*self.observations, *(state.spec for state in self.state)) if carried else self.observations
        )

    @cached_property
    def _inputs_by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.inputs}

    @cached_property
    def _request_inputs_by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.request_inputs}

    @staticmethod
    def _spec(name: str, known: Mapping[str, TensorSpec]) -> TensorSpec:
        spec = known.get(name)
        if spec is None:
            raise InvalidTensor(name, f"one of the inputs {', '.join(known)}", "an unknown name")
        return spec

    def select(self, names: Sequence[str]) -> tuple[str, ...]:
        """`names` of outputs, by default the action alone. Raises `UnknownOutput`."""
        for name in names:
            if name not in self.output_names:
                raise UnknownOutput(name, self.output_names)
        return tuple(names) or (self.action.name,)


def _size(batch: Mapping[str, Array], needed: Sequence[TensorSpec]) -> int:
    """The number of items in every tensor. Raises `InvalidTensor` if one is missing, and for several sizes or none."""
    for spec in needed:
        if spec.name not in batch:
            raise InvalidTensor(spec.name, str(spec), "nothing")
    sizes = {len(array) for array in batch.values()}
    if len(sizes) != 1:
        raise InvalidTensor(needed[0].name, "the same number of items in every input", f"{sorted(sizes)}")
    size = sizes.pop()
    if size < 1:
        raise InvalidTensor(needed[0].name, "at least one item", "none")
    return size


def _number(value: float) -> str:
    """A bound for people: whole numbers in full."""
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "any" if high is None else f"at most {_number(high)}"
    if high is None:
        return f"at least {_number(low)}"
    return f"{_number(low)} to {_number(high)}"


def describe(array: Array) -> str:
    """An array's dtype and shape, for messages: ``uint8[1, 210, 160, 3]``."""
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"
