"""TorchRL module -> ExportedProgram with a Signature: what is traced is a function of named arrays, batch first."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import set_composite_lp_aggregate
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from app.errors import CaptureFailed
from app.signature import Arrays, DType, Signature, TensorSpec
from exporters.source import PolicySource

MAX_BATCH = 256
TRACED_BATCH = 64  # a traced batch of 1 is taken for a constant, and AOTInductor picks branches by the example


class Positional(nn.Module):
    """A tensordict policy as a function of tensors, (B, ...) each, in the order of `names`, to its `outputs`."""

    def __init__(self, policy: nn.Module, names: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.policy = policy
        self.names = names
        self.outputs = outputs
        # torch.export names the program's inputs after the parameters of forward.
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        self.__dict__["forward"] = _with_signature(self.act, inspect.Signature(parameters))

    def act(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.names, tensors, strict=True))
        result: TensorDictBase = self.policy(TensorDict(inputs, batch_size=[tensors[0].shape[0]]))
        # Contiguous, because a program's reader takes strides on trust.
        return tuple(result.get(name).contiguous() for name in self.outputs)


def _with_signature(function: Any, signature: inspect.Signature) -> Any:
    def forward(*args: Tensor, **kwargs: Tensor) -> Any:
        return function(*signature.bind(*args, **kwargs).args)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


@dataclass(frozen=True)
class Captured:
    """`program` is what is compiled; `reference` is the policy itself, run eagerly: what the program must repeat."""

    program: torch.export.ExportedProgram
    reference: nn.Module
    signature: Signature

    def run_reference(self, inputs: Mapping[str, Any]) -> Arrays:
        """The policy's own answers, eagerly. `inputs` by name, each (B, *shape)."""
        tensors = [torch.from_numpy(inputs[spec.name]) for spec in self.signature.inputs]
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            outputs = self.reference(*tensors)
        return {name: tensor.numpy() for name, tensor in zip(self.signature.output_names, outputs, strict=True)}


def capture(source: PolicySource) -> Captured:
    """Trace the policy, deterministic, with a symbolic batch of 1 to `MAX_BATCH`. Raises `CaptureFailed`."""
    observations = tuple(_spec(str(name), tensor) for name, tensor in source.example.items())
    reference = Positional(source.policy, tuple(spec.name for spec in observations), source.outputs).eval()
    examples = tuple(tensor.expand(TRACED_BATCH, *tensor.shape).contiguous() for tensor in source.example.values())
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC), set_composite_lp_aggregate(False):
        outputs = _dry_run(reference, examples)
        try:
            program = torch.export.export(
                reference, examples, dynamic_shapes=tuple({0: batch} for _ in examples), strict=False
            )
        except Exception as error:  # torch.export raises a dozen types, with no common base
            raise CaptureFailed(f"torch.export could not trace the policy: {_first_lines(error)}") from error
    signature = Signature(
        observations,
        tuple(_spec(name, tensor[0]) for name, tensor in zip(source.outputs, outputs, strict=True)),
        MAX_BATCH,
    )
    _assert_symbolic(program)
    return Captured(program, reference, signature)


def _dry_run(reference: nn.Module, examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One eager call: it initialises lazy layers, and shows the outputs' dtypes and shapes."""
    try:
        outputs: tuple[Tensor, ...] = reference(*examples)
    except Exception as error:
        raise CaptureFailed(f"the policy cannot run its own example: {_first_lines(error)}") from error
    for tensor in outputs:
        if tensor.shape[:1] != (TRACED_BATCH,):
            raise CaptureFailed(f"every output must have the batch first; got the shape {tuple(tensor.shape)}")
    return outputs


def _spec(name: str, item: Tensor) -> TensorSpec:
    dtype = str(item.dtype).removeprefix("torch.")
    if dtype not in get_args(DType):
        raise CaptureFailed(f"{name}: expected one of {', '.join(get_args(DType))}; got {dtype}")
    return TensorSpec(name, dtype, tuple(item.shape))  # type: ignore[arg-type]


def _assert_symbolic(program: torch.export.ExportedProgram) -> None:
    """torch.export can silently fix the batch at the example's size: look at the graph, not at what was asked for."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    for name in (*program.graph_signature.user_inputs, *program.graph_signature.user_outputs):
        extent = values[str(name)].shape[0]
        if not isinstance(extent, torch.SymInt):
            raise CaptureFailed(f"{name}: expected a symbolic batch axis; tracing fixed it at {extent}")
    for bounds in program.range_constraints.values():
        if bounds.lower > 1 or bounds.upper < MAX_BATCH:
            raise CaptureFailed(f"expected a batch of 1 to {MAX_BATCH}; tracing narrowed it to {bounds}")


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
