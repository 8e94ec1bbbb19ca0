"""int8 programs: an `.onnx` whose middle layers compute with bytes. It is smaller, faster and slightly different.

ONNX Runtime quantises statically: activations as uint8, with the ranges measured on real inputs, and weights as int8,
with a scale per channel. `certify_narrow` then compares the result with the original on held-out inputs.

Layers that stay in floats, for `pong` (agreement on 2,048 held-out screens; speed against the tutorial's graph at
batch 8):

    the first convolution and the last layer       99.6 %   4.5x
    the second convolution as well                 99.8 %   3.2x
    all convolutions                               99.9 %   2.3x

With the first convolution in bytes, 92 to 98 % agree: the ball is a few pixels, slightly brighter than the background.
The other disagreements are near ties: on 1 % of the screens, the two best actions are within 0.1 of each other.
"""

from __future__ import annotations

import logging
import platform
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime import quantization as ortq
from onnxruntime.quantization.shape_inference import quant_pre_process

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Array, Arrays
from actserve.engine.golden import Tolerance, agreeing
from actserve_export.programs.onnx_session import open_session
from actserve_export.programs.quantize.compensate import (
    batches,
    correct_biases,
    equalize_channels,
    refit_last_layer,
)

AGREEMENT = 0.995  # the required share of actions that equal the original's
NEAR = Tolerance(0.01, 0.01)  # float actions within this count as equal
_LAYERS = ("Conv", "Gemm", "MatMul")
_DEQUANTIZE = "DequantizeLinear"
_BETWEEN = ("Relu", "Reshape", "Flatten", "Unsqueeze", "MaxPool")  # quantised if they are between two layers


def quantize(
    onnx_path: Path, calibration: Mapping[str, Array], *, full_range: bool = False
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """int8 programs that agree in at least `AGREEMENT` of the actions, the fastest first.

    Each comes with a JSON-able description of its quantisation, for the manifest.
    `calibration` holds real values of every input by name, each (N, *shape). Every fourth item calibrates the ranges;
    the others measure the agreement. Take a few thousand items: a hundred cannot tell 99.4 % from 99.7 %.
    The first and the last layer stay in floats. In the second program the second layer does too, and so on.
    `full_range` uses all 8 bits for weights and activations, else 7, with about twice the error. An x86 CPU without
    VNNI adds two products of bytes in 16 bits, which overflow with 8 bits and not with 7. The description's "requires"
    names the CPU feature.
    Raises `CaptureFailed` if no choice of layers reaches the agreement.
    """
    every_fourth = np.arange(len(next(iter(calibration.values())))) % 4 == 0
    ranges = {name: array[every_fourth] for name, array in calibration.items()}
    others = {name: array[~every_fourth] for name, array in calibration.items()}
    best, bits = 0.0, 8 if full_range else 7
    with tempfile.TemporaryDirectory(prefix="actserve-int8-") as folder, warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        prepared, draft = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(str(onnx_path), str(prepared), skip_symbolic_shape=True)
        layers = _layers(prepared)
        if len(layers) < 3:
            raise CaptureFailed(
                f"int8: the first and the last layer stay in floats; expected 3 layers or more, got {len(layers)}"
            )
        equalize_channels(prepared, layers, ranges)
        wanted = _actions(onnx_path, others)
        for first in range(1, len(layers) - 1):
            _quantize(prepared, draft, layers[first:-1], ranges, full_range)
            correct_biases(prepared, draft, layers[first:-1], ranges)
            refit_last_layer(prepared, draft, layers[-1], ranges)
            agreement = float(np.mean(agreeing(_actions(draft, others), wanted, NEAR)))
            best = max(best, agreement)
            if agreement >= AGREEMENT:
                made = {
                    "method": f"static; activations and weights of {bits} bits, weights per channel",
                    "int8_layers": layers[first:-1],
                    "float_layers": [*layers[:first], layers[-1]],
                    "calibration_samples": len(every_fourth),
                    "calibration_agreement": agreement,
                    "requires": {"cpu_flags": ["avx512_vnni"]} if full_range and is_x86() else {},
                }
                yield draft.read_bytes(), made
    if best < AGREEMENT:
        raise CaptureFailed(f"int8: at best {best:.2%} of the actions agree; {AGREEMENT:.1%} are needed")


def _quantize(
    prepared: Path, target: Path, layers: Sequence[str], calibration: Mapping[str, Array], full_range: bool
) -> None:
    """Quantise `layers` and the nodes between them."""
    nodes = onnx.load(str(prepared)).graph.node
    others = [node.name for node in nodes if node.op_type in _LAYERS and node.name not in layers]
    products = {node.output[0] for node in nodes if node.op_type == "Gemm"}
    others += [node.name for node in nodes if node.op_type == "Relu" and node.input[0] in products]
    ortq.quantize_static(
        str(prepared),
        str(target),
        _Reader(calibration),
        quant_format=ortq.QuantFormat.QDQ,
        op_types_to_quantize=[*_LAYERS, *_BETWEEN],
        nodes_to_exclude=others,
        per_channel=True,
        reduce_range=not full_range,
        activation_type=ortq.QuantType.QUInt8,
        weight_type=ortq.QuantType.QInt8,
        calibrate_method=ortq.CalibrationMethod.MinMax,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
    )
    _use_integer_products(prepared, target)


def _use_integer_products(prepared: Path, target: Path) -> None:
    """Give linear layers float outputs: bytes in, 32-bit sums, scaled once.

    Rounding their outputs to bytes too would cause a third of the whole error and save nothing. For float outputs, ONNX
    Runtime's quantiser writes a Gemm between conversions, which it cannot fuse. This function writes the products out.
    """
    biases = {node.name: node.input[2:] for node in onnx.load(str(prepared)).graph.node if node.op_type == "Gemm"}
    model = onnx.load(str(target))
    graph = model.graph
    made_by = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    floats = {tensor.name: tensor for tensor in onnx.load(str(prepared)).graph.initializer}

    def constant(name: str, value: Array) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    for position, node in reversed(list(enumerate(graph.node))):
        sources = [made_by[name] for name in node.input[:2] if name in made_by]
        if node.op_type != "Gemm" or [source.op_type for source in sources] != [_DEQUANTIZE, _DEQUANTIZE]:
            continue
        (items, item_scale, item_zero), (weight, weight_scale, _) = (source.input for source in sources)
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        integers = constants[weight].T if transposed else constants[weight]
        name, (output,) = node.name, node.output
        scale = (constants[item_scale] * constants[weight_scale]).astype(np.float32)
        new = [
            helper.make_node(
                "MatMulInteger",
                [items, constant(f"{name}_weight", np.ascontiguousarray(integers)), item_zero],
                [f"{name}_sums"],
                name,
            ),
            helper.make_node("Cast", [f"{name}_sums"], [f"{name}_floats"], f"{name}_cast", to=onnx.TensorProto.FLOAT),
            helper.make_node(
                "Mul", [f"{name}_floats", constant(f"{name}_scale", scale)], [f"{name}_scaled"], f"{name}_mul"
            ),
        ]
        if biases[name]:
            bias = constant(f"{name}_bias", numpy_helper.to_array(floats[biases[name][0]]))
            new.append(helper.make_node("Add", [f"{name}_scaled", bias], [output], f"{name}_add"))
        else:
            new[-1].output[0] = output
        graph.node.remove(node)
        for later in reversed(new):
            graph.node.insert(position, later)
    _prune(graph)
    onnx.checker.check_model(model)
    onnx.save(model, str(target))


def _prune(graph: Any) -> None:
    """Remove unused conversions, then unused constants."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for node in [node for node in graph.node if node.op_type == _DEQUANTIZE and node.output[0] not in used]:
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def is_x86() -> bool:
    """Whether the CPU is an x86, which without VNNI adds products of bytes in 16 bits."""
    return platform.machine().lower() in ("x86_64", "amd64")


def _layers(path: Path) -> list[str]:
    """The names of the layers with weights, in order. Products before the first convolution are preprocessing."""
    graph = onnx.load(str(path)).graph
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in _LAYERS and len(weights.intersection(node.input)) > 0]
    convolutions = [number for number, node in enumerate(nodes) if node.op_type == "Conv"]
    return [node.name for node in nodes[convolutions[0] if convolutions else 0 :]]


class _Reader(ortq.CalibrationDataReader):
    """Feeds the calibration samples in batches."""

    def __init__(self, calibration: Mapping[str, Array]) -> None:
        self._batches = batches(calibration)

    def get_next(self) -> Arrays | None:
        return next(self._batches, None)


def _actions(path: Path, inputs: Mapping[str, Array]) -> Array:
    """The program's first output, the action, for all `inputs`."""
    session = open_session(path.read_bytes())
    action = session.get_outputs()[0].name
    return np.concatenate([session.run([action], batch)[0] for batch in batches(inputs)])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the quantiser, which advises on the root logger to prepare models that are prepared already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
