"""Compensation of the rounding errors of an int8 `.onnx` program. Each function changes a file in place.

`equalize_channels` runs before quantisation, so that one scale fits all channels. `correct_biases` and
`refit_last_layer` run after it, and compare the layers' outputs in both programs on real inputs.
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


def equalize_channels(prepared: Path, layers: Sequence[str], calibration: Mapping[str, Array]) -> None:
    """Give every channel between two layers the same range, by scaling the weights before and after it.

    relu(x / s) * s equals relu(x), so the program computes the same. Quantisation has one scale for all channels, which
    then fits each of them (Nagel et al. 2019, Data-Free Quantization, with measured ranges). For `pong` this reduces
    the error of the linear layer by a quarter, and that of the convolutions by half.
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
        by_channel = value.reshape(len(value), len(scale), -1)  # flattening keeps each channel together
        _set(weights[after.input[1]], (by_channel * scale[None, :, None]).reshape(value.shape))
    onnx.save(model, str(prepared))


def _only_relu_between(graph: Any, before: Any, after: Any) -> str | None:
    """The output of the ReLU, if only it and reshapes are between two layers with weights (out, in, ...); else None."""
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


def correct_biases(prepared: Path, target: Path, layers: Sequence[str], calibration: Mapping[str, Array]) -> None:
    """Correct each bias by the mean error of its layer's outputs, channel by channel, from the first layer on.

    Most of a screen never changes, so most of the rounding error does not either (empirical bias correction, Nagel et
    al. 2019). For `pong` this halves the error of the second convolution.
    """
    original, model = onnx.load(str(prepared)), onnx.load(str(target))
    outputs = {node.name: node.output[0] for node in original.graph.node}
    nodes = {node.name: node for node in model.graph.node}
    made_by = {node.output[0]: node for node in model.graph.node}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = _means(original, [outputs[name] for name in layers], calibration)
    for name, mean in zip(layers, wanted, strict=True):
        node = nodes.get(f"{name}_add", nodes[name])  # `_use_integer_products` replaces a linear layer
        bias = node.input[-1] if node.op_type == "Add" or len(node.input) == 3 else None
        if bias is None:
            continue
        off = mean - _means(model, [node.output[0]], calibration)[0]
        if bias in made_by:  # a convolution's bias is a whole multiple of its scale
            bias, scale, *_ = made_by[bias].input
            off = np.rint(off / numpy_helper.to_array(constants[scale]))
        tensor = constants[bias]
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((value + off).astype(value.dtype), bias))
    onnx.save(model, str(target))


def refit_last_layer(prepared: Path, target: Path, layer: str, calibration: Mapping[str, Array]) -> None:
    """Fit the last layer, which is in floats, to the features that the int8 layers give.

    Ridge regression of the remaining error on the features keeps the weights near their old values. The weight of the
    penalty is the mean squared norm of a feature vector. For `pong` this reduces the remaining error by a tenth.
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
    """The named tensors, which must be (N, channels), in float64."""
    return [np.hstack(seen).T.astype(np.float64) for seen in _observe(model, names, calibration, lambda value: value)]


def _means(model: Any, names: Sequence[str], calibration: Mapping[str, Array]) -> list[Array]:
    """The mean of each channel of the named tensors."""
    means = _observe(model, names, calibration, lambda value: value.mean(axis=1))
    return [np.mean(seen, axis=0) for seen in means]


def _largest(model: Any, names: Sequence[str], calibration: Mapping[str, Array]) -> list[Array]:
    """The largest value of each channel of the named tensors."""
    largest = _observe(model, names, calibration, lambda value: value.max(axis=1))
    return [np.max(seen, axis=0) for seen in largest]


def _observe(
    model: Any, names: Sequence[str], calibration: Mapping[str, Array], reduce: Callable[[Array], Array]
) -> Iterator[tuple[Array, ...]]:
    """For each named tensor, `reduce` of it as (channels, other values), batch by batch."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    for name in names:
        if name not in {output.name for output in model.graph.output}:
            observed.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = open_session(observed.SerializeToString())
    runs = (session.run(list(names), batch) for batch in batches(calibration))
    return zip(*([reduce(_channels_first(value)) for value in values] for values in runs), strict=True)


def _channels_first(value: Array) -> Array:
    return np.moveaxis(value, 1, 0).reshape(value.shape[1], -1)


def _set(tensor: Any, value: Array) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), tensor.name))


def batches(inputs: Mapping[str, Array]) -> Iterator[Arrays]:
    """`inputs` by name, each (N, *shape), in batches of `CALIBRATION_BATCH`."""
    count = len(next(iter(inputs.values())))
    for start in range(0, count, CALIBRATION_BATCH):
        yield {name: array[start : start + CALIBRATION_BATCH] for name, array in inputs.items()}
