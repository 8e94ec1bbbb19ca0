"""torch.export of one step, with checks: the batch is symbolic, and the graph draws no random numbers."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr

import torch
from torch import nn
from torch.export._trace import _export

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Signature
from actserve_export.capture.arguments import arguments_of
from actserve_export.capture.value_checks import without_value_checks
from actserve_export.programs.reasons import explain

MAX_BATCH = 256


def trace(program: Callable[[], nn.Module], signature: Signature, batch: int) -> torch.export.ExportedProgram:
    """Export a function of the signature's inputs, with a symbolic batch; with `batch` 1, for single items.

    `program` makes it anew: tracing can harm a module. Raises `CaptureFailed`.
    """
    examples = tuple(torch.from_numpy(spec.zeros(batch)) for spec in signature.inputs)
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    dynamic = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)} if batch > 1 else None
    try:
        # Where it fails, torch prints the graph so far.
        with without_value_checks(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.filterwarnings("ignore", message=".*_flat_weights")  # torch's LSTM rebuilds its list of weights
            shapes = tuple(dynamic for _ in examples)
            exported = torch.export.export(program(), examples, dynamic_shapes=shapes, strict=False)
            if any(_is_vmap(node) for node in exported.graph.nodes):  # below the level of vmap, there is none left
                exported = _export(program(), examples, dynamic_shapes=shapes, strict=False, pre_dispatch=False)
    except CaptureFailed:
        raise
    except Exception as error:  # torch.export raises a dozen types, with no common base
        raise CaptureFailed(f"torch.export could not trace the policy: {explain(error)}") from error
    if batch > 1:
        _assert_symbolic(exported)
    _assert_deterministic(exported)
    return exported


def _is_vmap(node: torch.fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def _assert_symbolic(program: torch.export.ExportedProgram) -> None:
    """Check the graph, because torch.export can silently fix the batch at the example's size."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    for name in (*program.graph_signature.user_inputs, *program.graph_signature.user_outputs):
        extent = values[str(name)].shape[0]
        if not isinstance(extent, torch.SymInt):
            raise CaptureFailed(f"{name}: expected a symbolic batch axis; tracing fixed it at {extent}")
    for bounds in program.range_constraints.values():
        if bounds.lower > 1 or bounds.upper < MAX_BATCH:
            raise CaptureFailed(f"expected a batch of 1 to {MAX_BATCH}; tracing narrowed it to {bounds}")


def _assert_deterministic(program: torch.export.ExportedProgram) -> None:
    """Refuse random nodes: they cannot be seeded, and the two runtimes would draw different numbers."""
    for node in program.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _draws(node):
            raise CaptureFailed(f"{node.target} is random, and was not made an input of the program")


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operator that is tagged as random draws with these arguments: most do so in training mode only."""
    values = arguments_of(node)
    training = values.get("train", values.get("training", True))
    share = next((values[name] for name in ("dropout_p", "dropout", "p") if name in values), 1.0)
    return bool(training) and share != 0
