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
        model = onnx.load(str(path))
        if not model.ByteSize():
            raise DecodeError("it is empty")
        return model
    except (OSError, ValueError, DecodeError, onnx.checker.ValidationError) as error:
        raise UsageError(f"{path.name} is no .onnx file that can be read: {one_line(error)}") from error


def opset_of(model: Any) -> int:
    """The version of ONNX's own operators that the model needs."""
    return max(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def refuse_random(graph: Any) -> None:
    """Raise `CaptureFailed` for a graph that draws random numbers."""
    for node in nodes_of(graph):
        if node.op_type in _RANDOM:
            raise CaptureFailed(
                f"{node.op_type} draws random numbers that could not be seeded; export the deterministic policy"
            )


def remove_source_traces(graph: Any) -> None:
    """Remove the notes of exporters on each node's origin, which name folders of the machine."""
    for node in nodes_of(graph):
        node.ClearField("metadata_props")
        node.ClearField("doc_string")


def nodes_of(graph: Any) -> Iterator[Any]:
    """The nodes of the graph and of those inside its nodes, such as the branches of an If."""
    for node in graph.node:
        yield node
        yield from nodes_inside(node)


def nodes_inside(node: Any) -> Iterator[Any]:
    """The nodes of the graphs that `node` holds."""
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from nodes_of(inner)


def inputs_of(graph: Any, axes: Mapping[str, int]) -> tuple[list[TensorSpec], dict[str, int], bool]:
    """(the inputs of the graph, the batch axis of each, whether the graph takes only one item at a time).

    `axes` says where the batch is. By default it is the first axis if that is open, or else the only open one, or
    else an axis of size 1. Raises `CaptureFailed`.
    """
    weights = {tensor.name for tensor in graph.initializer}
    values = {value.name: value.type.tensor_type for value in graph.input if value.name not in weights}
    for name in axes:
        if name not in values and name not in [value.name for value in graph.output]:
            raise CaptureFailed(f"no tensor named {name!r} with a batch axis; the file takes {', '.join(values)}")
    any_open = any(not axis.dim_value for tensor in values.values() for axis in tensor.shape.dim)
    specs, found, single = [], {}, False
    for name in keys_by_name(values, "input"):
        if not values[name].HasField("shape"):
            raise CaptureFailed(
                f"{name}: the file does not state its shape; export the file with the shape of each input"
            )
        sizes: list[Any] = [axis.dim_value or axis.dim_param or "?" for axis in values[name].shape.dim]
        axis = axes[name] if name in axes else _batch_axis(name, sizes, any_open)
        axis += len(sizes) * (axis < 0)
        if not 0 <= axis < len(sizes) or (isinstance(sizes[axis], int) and sizes[axis] != 1):
            raise CaptureFailed(
                f"{name}: expected a batch of any size or of 1 at axis {axis}; the file's shape is {sizes}"
            )
        item = [size for index, size in enumerate(sizes) if index != axis]
        if any(isinstance(size, str) for size in item):
            raise CaptureFailed(
                f"{name}: expected one open axis, the batch; the file's shape is {sizes}. Export the file with a fixed "
                "size for every other axis"
            )
        single |= sizes[axis] == 1
        specs.append(TensorSpec(name, dtype_of(name, dtype_in_file(name, values[name])), tuple(item)))
        found[name] = axis
    return specs, found, single


def _batch_axis(name: str, sizes: Sequence[Any], any_open: bool) -> int:
    opened = [axis for axis, size in enumerate(sizes) if isinstance(size, str)]
    if opened:
        return 0 if 0 in opened or len(opened) > 1 else opened[0]
    if 1 in sizes and not (any_open and set(sizes) == {1}):  # one number beside open batches is a setting
        return sizes.index(1)
    raise CaptureFailed(
        f"{name}: expected an axis for the batch, open or of size 1; the file's shape is {list(sizes)}. If it is a "
        "setting, give it a value (constants, or --constant NAME=VALUE); if not, export the file with a batch axis"
    )


def outputs_of(graph: Any, asked: Sequence[str], state: Mapping[str, str], fixed: Sequence[str]) -> list[str]:
    """The names of the program's outputs: those in `asked` (if empty, all but `fixed`), then new state.

    `state` maps state inputs to the outputs that replace them. Raises `CaptureFailed` for an unknown name.
    """
    there = [value.name for value in graph.output]
    taken = [value.name for value in graph.input]
    for name in state:
        if name not in taken:
            raise CaptureFailed(f"no input named {name!r} to be state; the file takes {', '.join(taken)}")
    new_state = list(state.values())
    wanted = [*(asked or [name for name in there if name not in (*fixed, *new_state)]), *new_state]
    for name in wanted:
        if name not in there:
            raise CaptureFailed(f"no output named {name!r}; the file gives {', '.join(there)}")
    return list(keys_by_name(wanted, "output"))


def dtype_of(name: str, dtype: np.dtype[Any]) -> DType:
    """The signature's name for a numpy dtype. Raises `CaptureFailed` for a dtype that no client can send."""
    # ONNX Runtime's arrays cannot hold bfloat16.
    possible: list[DType] = [known for known in get_args(DType) if known != "bfloat16"]
    for known in possible:
        if dtype.name == known:
            return known
    got = "strings" if dtype.kind == "O" else dtype
    raise CaptureFailed(f"{name}: expected one of {', '.join(possible)}; got {got}. Export the file with one of these")


def dtype_in_file(name: str, declared: Any) -> np.dtype[Any]:
    """The numpy dtype of a declared tensor. Raises `CaptureFailed` if the file does not state it."""
    try:
        dtype: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(declared.elem_type)
        return dtype
    except KeyError as error:
        raise CaptureFailed(f"{name}: the file states no dtype that this onnx knows ({declared.elem_type})") from error


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
    for spec, named in zip(signature.results, signature.graph_results, strict=True):
        if spec.name != named.name:  # an input that is an output too
            graph.node.append(onnx.helper.make_node("Identity", [spec.name], [named.name]))
    weights = {tensor.name for tensor in graph.initializer}
    defaults = [value for value in graph.input if value.name in weights]
    for values, specs, kept in ((graph.input, signature.inputs, defaults), (graph.output, signature.graph_results, [])):
        declared = [
            onnx.helper.make_tensor_value_info(
                spec.name, onnx.helper.np_dtype_to_tensor_dtype(spec.numpy_dtype), [batch, *spec.shape]
            )
            for spec in specs
        ]
        del values[:]
        values.extend([*declared, *kept])
