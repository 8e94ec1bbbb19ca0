"""The graph of an `.onnx` file: reading its inputs and outputs, and changing it for the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from actserve.core.errors import CaptureFailed, UsageError, one_line
from actserve.core.signature import DType, Signature, TensorSpec
from actserve_export.sources.keys import keys_by_name

_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")


def read_model(path: Path) -> Any:
    """The model, including weights in external files. Raises `UsageError`."""
    try:
        return onnx.load(str(path))
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise UsageError(f"{path.name} is no .onnx file that can be read: {one_line(error)}") from error


def opset_of(model: Any) -> int:
    """The version of ONNX's own operators that the model needs."""
    return max(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def refuse_random(graph: Any) -> None:
    """Raise `CaptureFailed` for a graph that draws random numbers."""
    for node in _nodes(graph):
        if node.op_type in _RANDOM:
            raise CaptureFailed(
                f"{node.op_type} draws random numbers that could not be seeded; export the deterministic policy"
            )


def remove_source_traces(graph: Any) -> None:
    """Remove the notes of exporters on each node's origin, which name folders of the machine."""
    for node in _nodes(graph):
        node.ClearField("metadata_props")
        node.ClearField("doc_string")


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def inputs_of(graph: Any) -> tuple[list[TensorSpec], bool]:
    """(the inputs of the graph, whether it takes only one item at a time). Raises `CaptureFailed`."""
    weights = {tensor.name for tensor in graph.initializer}
    values = {value.name: value.type.tensor_type for value in graph.input if value.name not in weights}
    specs, single = [], False
    for name in keys_by_name(values, "input"):
        sizes: list[Any] = [axis.dim_value or axis.dim_param or "?" for axis in values[name].shape.dim]
        if not sizes or (isinstance(sizes[0], int) and sizes[0] != 1):
            raise CaptureFailed(f"{name}: expected the batch first, of any size or of 1; the file's shape is {sizes}")
        if any(isinstance(size, str) for size in sizes[1:]):
            raise CaptureFailed(f"{name}: expected fixed sizes after the batch; the file's shape is {sizes}")
        single = single or sizes[0] == 1
        dtype = onnx.helper.tensor_dtype_to_np_dtype(values[name].elem_type)
        specs.append(TensorSpec(name, dtype_of(name, dtype), tuple(sizes[1:])))
    return specs, single


def outputs_of(graph: Any, asked: Sequence[str], state: Mapping[str, str]) -> list[str]:
    """The names of the program's outputs: those in `asked` (if empty, all of the graph's), then new state.

    `state` maps state inputs to the outputs that replace them. Raises `CaptureFailed` for an unknown name.
    """
    there = [value.name for value in graph.output]
    taken = [value.name for value in graph.input]
    for name in state:
        if name not in taken:
            raise CaptureFailed(f"no input named {name!r} to be state; the file takes {', '.join(taken)}")
    new_state = list(state.values())
    wanted = [*(asked or [name for name in there if name not in new_state]), *new_state]
    for name in wanted:
        if name not in there:
            raise CaptureFailed(f"no output named {name!r}; the file gives {', '.join(there)}")
    return list(keys_by_name(wanted, "output"))


def dtype_of(name: str, dtype: np.dtype[Any]) -> DType:
    """The signature's name for a numpy dtype. Raises `CaptureFailed` for a dtype that no client can send."""
    for known in get_args(DType):
        if dtype == known:
            result: DType = known
            return result
    raise CaptureFailed(f"{name}: expected one of {', '.join(get_args(DType))}; got {dtype}")


def add_argmax(graph: Any, scores: TensorSpec) -> TensorSpec:
    """Add the output `action`: the index of the largest of `scores`, (B, ..., n)."""
    if not scores.shape:
        raise CaptureFailed(f"{scores.name}: expected a value for each action; got one number")
    if any("action" in (*node.input, *node.output) for node in graph.node):
        raise CaptureFailed(
            "the file has a tensor named 'action' already; is it the action? Then export it without argmax"
        )
    graph.node.append(onnx.helper.make_node("ArgMax", [scores.name], ["action"], axis=-1, keepdims=0))
    return TensorSpec("action", "int64", scores.shape[:-1])


def write_signature(graph: Any, signature: Signature) -> None:
    """Declare the signature's inputs and outputs in the graph. A file may leave shapes open, and have more outputs."""
    batch = "batch" if signature.max_batch > 1 else 1
    weights = {tensor.name for tensor in graph.initializer}
    defaults = [value for value in graph.input if value.name in weights]
    for values, specs, kept in ((graph.input, signature.inputs, defaults), (graph.output, signature.results, [])):
        declared = [
            onnx.helper.make_tensor_value_info(
                spec.name, onnx.helper.np_dtype_to_tensor_dtype(spec.numpy_dtype), [batch, *spec.shape]
            )
            for spec in specs
        ]
        del values[:]
        values.extend([*declared, *kept])
