"""TorchRL module -> ExportedProgram with a Signature. The traced function takes and returns tensors, batch first."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from tensordict.nn import set_composite_lp_aggregate
from torch import Tensor, nn

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Arrays, Exploration, Signature, State, TensorSpec
from actserve.store.artifact import Program
from actserve_export.capture.bounds import IndexBounds, narrowed, spec_bounds
from actserve_export.capture.chunks import with_chunk
from actserve_export.capture.company import FEWEST_ITEMS, ITEMS, affordable, dependence, refuse_hidden_draws
from actserve_export.capture.hidden_state import refuse_hidden_state
from actserve_export.capture.indices import refuse_negative_indices
from actserve_export.capture.layout import Layout, layout_of, modules_in_order
from actserve_export.capture.lazy import refuse_uninitialised, without_initialisation
from actserve_export.capture.log_prob import misplaced_log_probs, writers
from actserve_export.capture.mixing import mixing_reason
from actserve_export.capture.step_io import StepIO, Undrawable, dtype_name
from actserve_export.capture.step_program import StepProgram
from actserve_export.capture.swaps import swap
from actserve_export.capture.trace import MAX_BATCH, trace
from actserve_export.capture.transforms import connect
from actserve_export.programs.cost import first
from actserve_export.programs.exported import PROGRAM, save_program
from actserve_export.programs.reasons import explain, refuse_what_has_no_values_or_source
from actserve_export.programs.rewrites.optimize import fold, optimize
from actserve_export.sources import samples
from actserve_export.sources.policy_source import PolicySource
from actserve_export.sources.tensors import to_array

log = logging.getLogger("actserve")
RECORDED_BATCH = 13  # of the eager runs on the example; no usual size of a layer
TRACED_BATCH = 64  # tracing takes a batch of 1 for a constant, and AOTInductor chooses branches by the example
DRAWS, FEWEST_DRAWS = 1024, 64  # items whose log-probability is checked


@dataclass(frozen=True)
class TracedPolicy:
    """`program` is the traced policy; `reference` runs the policy eagerly. The program must repeat its results."""

    program: Any  # torch.export.ExportedProgram
    reference: nn.Module
    signature: Signature
    layout: Layout
    single_item_reason: str | None = None  # why it takes one item a call; None: it takes batches
    left_out: str = ""  # the outputs that are left out, and why
    deterministic_only: str = ""  # why the random actions of the policy cannot be exported
    runtimes: ClassVar[tuple[str, ...]] = ("onnx", "pt2")

    @cached_property
    def folded(self) -> tuple[Any, list[str]]:
        """(the program that is stored and built, the rewrites that led to it)."""
        return fold(self.program)

    def run_reference(self, inputs: Mapping[str, Any]) -> Arrays:
        """The results of the policy, run eagerly. `inputs` by name, each (B, *shape)."""
        tensors = [torch.from_numpy(inputs[spec.name]) for spec in self.signature.inputs]
        try:
            with torch.no_grad(), set_composite_lp_aggregate(False):
                outputs = self.reference(*tensors)
        except Exception as error:
            raise CaptureFailed(f"the policy fails on a batch of {len(tensors[0])}: {explain(error)}") from error
        return {spec.name: to_array(tensor) for spec, tensor in zip(self.signature.results, outputs, strict=True)}

    def graph(self) -> str:
        """The graph as torch prints it, without the machine's folders."""
        text: str = self.program.graph_module.print_readable(print_output=False)
        return re.sub(r"# File: (?:[^\s:]*/(?:site|dist)-packages/|[^\s:]*/)", "# File: ", text)

    def weights_sha256(self) -> str:
        digest = hashlib.sha256()
        tensors: dict[str, Any] = dict(self.program.state_dict) | dict(self.program.constants)
        for name, tensor in sorted(tensors.items()):
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, programs: Mapping[str, Program]) -> dict[str, Path]:
        """The exported program, from which `actserve compile` builds a `.pt2` on another host.

        It refers to the weights that the `.onnx` holds.
        """
        portable = [programs["onnx"].file] if "onnx" in programs else []
        save_program(self.folded[0], folder / PROGRAM, {file: (folder / file).read_bytes() for file in portable})
        return {PROGRAM: folder / PROGRAM}

    def build(self, runtime: str, folder: Path, target: Mapping[str, Any]) -> Program:
        """Rewrite the graph for one runtime and build its program file in `folder`."""
        program, folded = self.folded
        program, rewrites = optimize(program, runtime)
        file = f"policy.{runtime}"
        if runtime == "onnx":
            from actserve_export.programs.onnx import convert_program

            requires = convert_program(program, self.signature, folder / file)
        else:
            from actserve_export.programs.aoti import compile_program

            requires = compile_program(program, folder / file, **target)
        return Program(file, requires, (*folded, *rewrites))


def capture_policy(source: PolicySource) -> TracedPolicy:
    """Trace one step of the policy with a symbolic batch of 1 to `MAX_BATCH`, or if that fails, for one item at a time.

    Raises `CaptureFailed`.
    """
    io = StepIO()
    refuse_what_has_no_values_or_source(source.policy)
    refuse_uninitialised(source.policy.named_parameters())
    policy = swap(source.policy, io).eval()
    if any(parameter.device.type != "cpu" for parameter in (*policy.parameters(), *policy.buffers())):
        policy = policy.cpu()
    refuse_uninitialised(policy.named_buffers())
    source = replace(source, example=connect(modules_in_order(policy), source.example, io, source.outputs or ()))
    layout = layout_of(source, policy)
    io.taken = {*layout.observations, *layout.states}
    items = {name: source.example.get(key).cpu() for name, key in layout.observations.items()}
    items |= {name: source.example.get(read).cpu() for name, (read, _) in layout.states.items()}
    for name, item in items.items():
        dtype_name(name, item.dtype)
    with torch.no_grad(), set_composite_lp_aggregate(False), without_initialisation():
        probe = StepProgram(policy, io, layout, ("random",))
        undrawable = _undrawable(probe, items)
        if undrawable is not None:
            if source.exploration is not None and "random" in source.exploration:
                raise undrawable
            log.warning("this policy acts deterministically only: %s", undrawable.message)
            probe = StepProgram(policy, io, layout, ("deterministic",))
        refuse_hidden_state(policy, lambda: _record(probe, items, noisy=True))
        modes = probe.modes if undrawable else _modes(policy, io, layout, items, source.exploration)
        program = StepProgram(policy, io, layout, modes)
        bounds = IndexBounds()
        results = _record(program, items, bounds)
        signature = _signature(program, items, results)
        signature = _bounded(with_chunk(signature, source.chunk), bounds, source, layout)
        program.halves = {name for name, item in items.items() if item.dtype == torch.bfloat16}
        program.bind(tuple(spec.name for spec in signature.inputs))
        traced = TracedPolicy(None, program, signature, layout)
        inputs = samples.collect(source, signature, ITEMS)
        count = max(FEWEST_ITEMS, affordable(traced.run_reference, inputs))
        inputs = first(inputs, count)
        refuse_hidden_draws(traced.run_reference, inputs)
        if unfit := _misplaced(traced, source):
            return capture_policy(_without(source, layout, unfit))
        reason = dependence(traced.run_reference, signature, inputs)
        if reason is None:
            try:
                exported = trace(partial(_copied, program, signature), signature, TRACED_BATCH)
            except CaptureFailed as error:
                reason = f"with a batch the export failed: {error.message}"
            else:
                reason = mixing_reason(exported)
        if reason is not None:
            log.warning("exported one item at a time: %s", reason)
            signature = replace(signature, max_batch=1)
            exported = trace(partial(_copied, program, signature), signature, 1)
    refuse_negative_indices(exported, signature)
    return replace(
        traced,
        program=exported,
        signature=signature,
        single_item_reason=reason,
        left_out=source.left_out,
        deterministic_only="" if undrawable is None else undrawable.message,
    )


def _copied(program: StepProgram, signature: Signature) -> StepProgram:
    """A copy to trace: a failed trace can leave a module without its weights."""
    return copy.deepcopy(program).bind(tuple(spec.name for spec in signature.inputs))


def _misplaced(traced: TracedPolicy, source: PolicySource) -> list[str]:
    """The outputs that are the log-probability of another action than the one that the policy returns."""
    program: Any = traced.reference
    if not writers(program.policy):
        return []
    inputs = samples.collect(source, traced.signature, FEWEST_DRAWS)
    count = min(DRAWS, affordable(traced.run_reference, inputs, runs=1))
    if count > FEWEST_DRAWS:
        inputs = samples.collect(source, traced.signature, count)
    with misplaced_log_probs(program.policy) as (wrong, check):
        program.watching.append(check)
        traced.run_reference(inputs)
        program.watching.clear()
    return [name for name, key in program.layout.outputs.items() if key in wrong]


def _without(source: PolicySource, layout: Layout, names: list[str]) -> PolicySource:
    """`source` without outputs that are wrong. Raises `CaptureFailed` if it names them itself."""
    listed = ", ".join(names)
    reason = (
        f"{listed}: not the log-probability of the action that the policy returns: the action is changed after it was "
        "drawn (projected to a spec, clamped, exploration noise), or saturates so that float32 cannot hold it"
    )
    if source.outputs:
        raise CaptureFailed(f"{reason}; leave it out of the outputs")
    log.warning("left out %s", reason)
    left = tuple(key for name, key in layout.outputs.items() if name not in names)
    return replace(source, outputs=left, left_out=reason)


def _undrawable(probe: StepProgram, items: Mapping[str, Tensor]) -> Undrawable | None:
    """Why the policy's random actions cannot be exported, or None. The policy itself stays as it is."""
    try:
        _record(copy.deepcopy(probe), items, noisy=True)
    except Undrawable as error:
        return error
    return None


def _modes(
    policy: nn.Module, io: StepIO, layout: Layout, items: Mapping[str, Tensor], wanted: tuple[Exploration, ...] | None
) -> tuple[Exploration, ...]:
    """The policy's modes: random only if it then draws, deterministic only if the policy defines it."""
    if wanted is not None:
        return wanted
    _record(StepProgram(policy, io, layout, ("random",)), items)
    drawn = len(io.noises)
    if not drawn:
        return ("deterministic",)
    try:
        results = _record(StepProgram(policy, io, layout, ("deterministic",)), items)
    except CaptureFailed as error:
        log.warning("this policy only acts at random; deterministic mode failed: %s", error.message)
        return ("random",)
    if len(io.noises) >= drawn:
        log.warning("this policy only acts at random: it draws as much in its deterministic mode")
        return ("random",)
    if any(bool(result.isnan().any()) for result in results):
        log.warning("this policy only acts at random: in its deterministic mode it gives NaN, as Cauchy's mean is")
        return ("random",)
    if io.noises:
        log.warning("this policy draws in its deterministic mode, too: a request in either mode has a seed")
    return ("deterministic", "random")


def _record(
    program: StepProgram, items: Mapping[str, Tensor], bounds: IndexBounds | None = None, *, noisy: bool = False
) -> tuple[Tensor, ...]:
    """The results of one eager call on the example, which records the requests to `StepIO`, and `bounds` of inputs.

    `noisy` adds noise to floating-point inputs. Inputs that the policy changes in place are noted in `program.io`.
    """
    program.io.clear()
    examples = {name: item.expand(RECORDED_BATCH, *item.shape).clone() for name, item in items.items()}
    if noisy:
        examples = {n: x + torch.randn_like(x) if x.is_floating_point() else x for n, x in examples.items()}
    originals = {name: tensor.clone() for name, tensor in examples.items()}
    if bounds is not None:
        bounds.watch(examples)
    try:
        with bounds or nullcontext():
            results = program.run(examples, recording=True)
    except CaptureFailed:
        raise
    except Exception as error:
        if noisy:  # a number that is an index must stay one
            return _record(program, items)
        given = ", ".join(f"{name} {_spec(name, item)}" for name, item in items.items())
        raise CaptureFailed(
            f"the policy cannot run its own example: {explain(error)}; it got a batch of {RECORDED_BATCH} of {given}"
        ) from error
    program.io.overwritten |= {name for name, tensor in examples.items() if not torch.equal(tensor, originals[name])}
    for name, tensor in zip(program.layout.outputs, results, strict=False):
        if tensor.shape[:1] != (RECORDED_BATCH,):
            raise CaptureFailed(f"{name}: expected the batch first; got the shape {tuple(tensor.shape)}")
    return results


def _signature(program: StepProgram, items: Mapping[str, Tensor], results: tuple[Tensor, ...]) -> Signature:
    layout, io = program.layout, program.io
    states = [State(_spec(name, items[name]), f"next_{name}", layout.initial[name]) for name in layout.states]
    return Signature(
        observations=tuple(_spec(name, items[name]) for name in layout.observations),
        outputs=tuple(_spec(name, tensor[0]) for name, tensor in zip(layout.outputs, results, strict=False)),
        max_batch=MAX_BATCH,
        state=(*states, *io.states.values()),
        is_init=io.uses_is_init,
        exploration=program.modes,
        parameters=tuple(io.parameters.values()),
        noise=tuple(io.noises),
    )


def _bounded(signature: Signature, found: IndexBounds, source: PolicySource, layout: Layout) -> Signature:
    """`signature` with the bounds that the graph and the source's spec state."""
    observations = []
    for spec in signature.observations:
        bounded = narrowed(spec, *found.found(spec.name))
        observations.append(narrowed(bounded, *spec_bounds(source.spec, layout.observations[spec.name])))
    states = tuple(
        replace(state, spec=narrowed(state.spec, *found.found(state.spec.name)))
        if state.spec.name in layout.states
        else state
        for state in signature.state
    )
    return replace(signature, observations=tuple(observations), state=states)


def _spec(name: str, item: Tensor) -> TensorSpec:
    return TensorSpec(name, dtype_name(name, item.dtype), tuple(item.shape))
