"""Rewrites of the exported graph that make a program faster and keep its answers.

Both runtimes get the rewrites in `simplify`. ONNX Runtime also gets `pick_pixels`. AOTInductor does not need it: it
fuses everything before the first convolution into one loop over the pixels that the resize keeps. With the pixels
picked first, its programs are slower (µs per frame at batch 1 / 8 / 32: 323 / 204 / 218 before, 335 / 221 / 243
after), and the matrix product doubles their time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from actserve_export.programs.rewrites.fold_batch_norms import BATCH_NORM, fold_batch_norms
from actserve_export.programs.rewrites.pick_pixels import pick_pixels_first
from actserve_export.programs.rewrites.simplify import (
    merge_common_subexpressions,
    remove_dead_code,
    remove_redundant_conversions,
)
from actserve_export.programs.rewrites.widen import compute_in_float32, recurrent_in_float32, writes_in_place

Rewrite = Callable[[fx.GraphModule], list[str]]  # changes the graph in place; the names of the changes
_FOR_ALL: tuple[Rewrite, ...] = (remove_redundant_conversions, merge_common_subexpressions, remove_dead_code)
_FOR_RUNTIME: dict[str, tuple[Rewrite, ...]] = {
    "onnx": (pick_pixels_first, compute_in_float32),
    "pt2": (recurrent_in_float32,),
}


def fold(program: torch.export.ExportedProgram) -> tuple[torch.export.ExportedProgram, list[str]]:
    """A program with fewer layers and the same answers, for every runtime and for the store. Returns as `optimize`."""
    if not any(node.target is BATCH_NORM for node in program.graph.nodes):
        return program, []
    return _rewritten(program, (fold_batch_norms,))


def optimize(
    program: torch.export.ExportedProgram, runtime: str = "onnx", *more: Rewrite
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """A program that gives the same answers faster in `runtime`, and the names of the rewrites, for the manifest.

    `more` rewrites come last. Values may change by float rounding (about 1e-7); the certificate decides whether that is
    acceptable. The symbolic batch axis, the inputs and the outputs do not change. If no rewrite applies, or the result
    cannot be exported again, returns the program itself and an empty list.
    """
    if runtime == "onnx" and writes_in_place(program) and not _mutates(program):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            program = program.run_decompositions({})
    return _rewritten(program, (*_FOR_ALL, *_FOR_RUNTIME[runtime], *more))


def _mutates(program: torch.export.ExportedProgram) -> bool:
    return bool(program.graph_signature.buffers_to_mutate or program.graph_signature.user_inputs_to_mutate)


def _rewritten(
    program: torch.export.ExportedProgram, rewrites: Sequence[Rewrite]
) -> tuple[torch.export.ExportedProgram, list[str]]:
    if _mutates(program):
        return program, []  # a tensor that the graph writes to can be neither shared nor removed
    module = program.module(check_guards=False)
    applied: list[str] = []
    for rewrite in rewrites:
        applied += rewrite(module)
    if not applied:
        return program, []
    remove_dead_code(module)  # left over from the last rewrites
    module.graph.lint()
    module.recompile()
    again = _export(module, program)
    return (program, []) if again is None else (again, applied)


def _export(module: fx.GraphModule, program: torch.export.ExportedProgram) -> torch.export.ExportedProgram | None:
    """The module exported with the inputs and the symbolic axes of `program`; None if that fails."""
    args, kwargs = program.example_inputs
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = torch.export.export(module, args, kwargs, dynamic_shapes=_symbolic_axes(program), strict=False)
    except Exception:  # torch.export raises a dozen types, with no common base
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
