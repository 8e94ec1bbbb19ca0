"""ExportedProgram -> one self-contained `.onnx` file."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Signature
from actserve_export.programs.onnx_graph import opset_of, remove_source_traces
from actserve_export.programs.reasons import explain


def convert_program(program: torch.export.ExportedProgram, signature: Signature, target: Path) -> dict[str, Any]:
    """Write `program` to `target`; returns its requirements on the host. Raises `CaptureFailed`."""
    try:
        try:
            model = _convert(program, signature, target, optimize=True)
        except onnx.checker.ValidationError:  # the optimizer removes nodes whose results it still uses: Max with Min
            model = _convert(program, signature, target, optimize=False)
    except CaptureFailed:
        raise
    except Exception as error:  # the converter raises many types, with no common base
        raise CaptureFailed(f"torch could not convert the program to ONNX: {explain(error)}") from error
    for value in (*model.graph.input, *model.graph.output):
        if signature.max_batch > 1 and not value.type.tensor_type.shape.dim[0].dim_param:
            raise CaptureFailed(f"{value.name}: expected a symbolic batch axis in the .onnx graph; it became fixed")
    return {"opset": opset_of(model)}


def _convert(program: torch.export.ExportedProgram, signature: Signature, target: Path, optimize: bool) -> Any:
    """Write the model to `target`, checked, and return it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is absent, which is not used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        # From an ExportedProgram, because exporting the module with dynamic_shapes silently fixes the batch.
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.graph_results],
            optimize=optimize,
            verbose=False,
        )
    assert exported is not None
    exported.save(str(target), external_data=False)
    model = onnx.load(str(target))
    remove_source_traces(model.graph)
    onnx.save(model, str(target))
    onnx.checker.check_model(model)
    return model
