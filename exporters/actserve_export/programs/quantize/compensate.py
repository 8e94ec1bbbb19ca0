"""What rounding to bytes does to an `.onnx` program, made good in what stays in floats.

`equalize` before, so that one scale for all channels fits each; `correct` and `refit` after, from what the layers of
the int8 program give on real inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from actserve.core.signature import Array, Arrays
from actserve_export.programs.onnx_session import open_session

CALIBRATION_BATCH = 8


def equalize(prepared: Path, layers: Sequence[str], calibration: Mapping[str, Array]) -> None:
    """Give every channel between two layers the same range, by scaling weights before and after: in place.

    relu(x / s) * s is relu(x), so the program stays what it is; but one scale for all channels, which is what bytes
    have, then fits each (Nagel et al. 2019, Data-Free Quantization, with measured ranges). For `pong` it takes a
    quarter off the error of the linear layer, and half off those of the convolutions.
    """
    model = onnx.load(str(prepared))
    nodes = {node.name: node for node in model.graph.node}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [(nodes[a], nodes[b]) for a, b in itertools.pairwise(layers[:-1])]
    links = [(a, relu, b) for a, b in pairs if (relu := _only_relu_between(model.graph, a, b)) is not None]
    if not links:
        return
    for (before, _, after), largest in zip(
        links, _largest(model, [relu for _, relu, _ in links], calibration), strict=True
    ):
        scale = np.maximum(largest, max(0.01 * float(largest.max()), 1e-12)).astype(np.float32)
        scale /= scale.max()
        for name in before.input[1:3]:
            value = numpy_helper.to_array(weights[name])
            _set(weights[name], value / scale.reshape(-1, *[1] * (value.ndim - 1)))
        value = numpy_helper.to_array(weights[after.input[1]])
        by_channel = value.reshape(len(value), len(scale), -1)  # a flattened picture has its channels one by one
        _set(weights[after.input[1]], (by_channel * scale[None, :, None]).reshape(value.shape))
    onnx.save(model, str(prepared))


def _only_relu_between(graph: Any, before: Any, after: Any) -> str | None:
    """The ReLU's output, if that and perhaps a reshape is all between two layers whose weights are (out, in, ...)."""
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for layer in (before, after):
        options = {attribute.name: attribute.i for attribute in layer.attribute}
        if (
            len(layer.input) != 3
            or options.get("group", 1) != 1
            or (layer.op_type != "Conv" and not options.get("transB"))
        ):
            return None
    relu, name = None, before.output[0]
    while [node.op_type for node in users.get(name, [])] in (["Relu"], ["Reshape"], ["Flatten"]):
        (node,) = users[name]
        if name not in node.input[:1]:
            return None
        name = node.output[0]
        relu = name if node.op_type == "Relu" else relu
    return relu if users.get(name) == [after] else None


def correct(prepared: Path, target: Path, layers: Sequence[str], calibration: Mapping[str, Array]) -> None:
    """Add to each bias what its layer's outputs are off on average, channel by channel, from the first layer on: in
    place.

    Most of a screen is always the same, and what rounding does to that is no noise: it is always the same, too
    (empirical bias correction, Nagel et al. 2019). For `pong` it halves the error of the second convolution.
    """
    original, model = onnx.load(str(prepared)), onnx.load(str(target))
    outputs = {node.name: node.output[0] for node in original.graph.node}
    nodes = {node.name: node for node in model.graph.node}
    made_by = {node.output[0]: node for node in model.graph.node}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = _means(original, [outputs[name] for name in layers], calibration)
    for name, mean in zip(layers, wanted, strict=True):
        node = nodes.get(f"{name}_add", nodes[name])  # what `_use_integer_products` has put in place of a linear layer
        bias = node.input[-1] if node.op_type == "Add" or len(node.input) == 3 else None
        if bias is None:
            continue
        off = mean - _means(model, [node.output[0]], calibration)[0]
        if bias in made_by:  # of a convolution, in whole multiples of its scale
            bias, scale, *_ = made_by[bias].input
            off = np.rint(off / numpy_helper.to_array(constants[scale]))
        tensor = constants[bias]
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((value + off).astype(value.dtype), bias))
    onnx.save(model, str(target))


def refit(prepared: Path, target: Path, layer: str, calibration: Mapping[str, Array]) -> None:
    """Fit the last layer, which is in floats, to the features that it now gets: in place.

    Ridge regression of what the original's outputs are more, on the features, so that the weights stay near what they
    were; one squared feature vector is the weight of that. For `pong` it takes a tenth off the error that is left.
    """
    original, model = onnx.load(str(prepared)), onnx.load(str(target))
    node = next(node for node in model.graph.node if node.name == layer)
    if node.op_type != "Gemm" or len(node.input) != 3:
        return
    features, outputs = _values(model, [node.input[0], node.output[0]], calibration)
    missing = _values(original, [node.output[0]], calibration)[0] - outputs
    features = np.hstack([features, np.ones((len(features), 1))])
    ridge = np.mean(np.sum(features**2, axis=1)) * np.eye(features.shape[1])
    more = np.linalg.solve(features.T @ features + ridge, features.T @ missing)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    for name, change in ((node.input[1], more[:-1].T if transposed else more[:-1]), (node.input[2], more[-1])):
        _set(constants[name], numpy_helper.to_array(constants[name]) + change)
    onnx.save(model, str(target))


def _values(model: Any, names: Sequence[str], calibration: Mapping[str, Array]) -> list[Array]:
    """(N, channels) of each of the named tensors, which have no other axes, in float64."""
    return [np.hstack(seen).T.astype(np.float64) for seen in _observe(model, names, calibration, lambda value: value)]


def _means(model: Any, names: Sequence[str], calibration: Mapping[str, Array]) -> list[Array]:
    """The mean of each channel of the named tensors."""
    means = _observe(model, names, calibration, lambda value: value.mean(axis=1))
    return [np.mean(seen, axis=0) for seen in means]


def _largest(model: Any, names: Sequence[str], calibration: Mapping[str, Array]) -> list[Array]:
    """The largest value that each channel of the named tensors takes."""
    largest = _observe(model, names, calibration, lambda value: value.max(axis=1))
    return [np.max(seen, axis=0) for seen in largest]


def _observe(
    model: Any, names: Sequence[str], calibration: Mapping[str, Array], see: Callable[[Array], Array]
) -> Iterator[tuple[Array, ...]]:
    """What `see` makes of each of the named tensors, given as (channels, anything), batch by batch."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    for name in names:
        if name not in {output.name for output in model.graph.output}:
            observed.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = open_session(observed.SerializeToString())
    runs = (session.run(list(names), batch) for batch in batches(calibration))
    return zip(*([see(_channels_first(value)) for value in values] for values in runs), strict=True)


def _channels_first(value: Array) -> Array:
    return np.moveaxis(value, 1, 0).reshape(value.shape[1], -1)


def _set(tensor: Any, value: Array) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), tensor.name))


def batches(inputs: Mapping[str, Array]) -> Iterator[Arrays]:
    """`inputs` by name, each (N, *shape), in batches of `CALIBRATION_BATCH`."""
    count = len(next(iter(inputs.values())))
    for start in range(0, count, CALIBRATION_BATCH):
        yield {name: array[start : start + CALIBRATION_BATCH] for name, array in inputs.items()}
