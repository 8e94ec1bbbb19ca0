"""TorchRL module -> ExportedProgram with a Signature. The traced function takes and returns tensors, batch first."""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential, set_composite_lp_aggregate
from torch import Tensor, nn
from torchrl.envs.transforms import Transform
from torchrl.envs.utils import ExplorationType, set_exploration_type

from actserve.core.errors import CaptureFailed, one_line
from actserve.core.signature import EXPLORE, IS_INIT, Arrays, Exploration, Signature, State, TensorSpec
from actserve.store.artifact import Program
from actserve_export.capture.noise import NoiseFromInputs
from actserve_export.capture.step_io import StepIO, dtype_name
from actserve_export.capture.steps import StepModule
from actserve_export.capture.swaps import reads_and_writes, swap
from actserve_export.capture.trace import MAX_BATCH, trace
from actserve_export.programs.exported import PROGRAM, save_program
from actserve_export.programs.rewrites.optimize import optimize
from actserve_export.sources.keys import Key, key_name, keys_by_name, last_part
from actserve_export.sources.policy_source import PolicySource

log = logging.getLogger("actserve")
TRACED_BATCH = 64  # tracing takes a batch of 1 for a constant, and AOTInductor chooses branches by the example
# Outputs that the program returns besides the action, if the policy writes them.
KNOWN_OUTPUTS = ("action_value", "logits", "loc", "scale", "state_value", "action_log_prob", "sample_log_prob")
MODES: dict[Exploration, Any] = {"deterministic": ExplorationType.DETERMINISTIC, "random": ExplorationType.RANDOM}


@dataclass(frozen=True)
class Layout:
    """The keys of the program's tensors in the policy's tensordict."""

    observations: dict[str, Key]  # by name
    states: dict[str, tuple[Key, Key]]  # name -> (the key read, the key written)
    outputs: dict[str, Key]
    is_init: bool  # the policy itself reads "is_init"
    is_init_shape: tuple[int, ...]


class StepProgram(nn.Module):
    """A tensordict policy as a function of tensors: the signature's inputs -> its results, (B, ...) each."""

    def __init__(self, policy: nn.Module, io: StepIO, layout: Layout, modes: tuple[Exploration, ...]) -> None:
        super().__init__()
        self.policy = policy
        self.layout = layout
        self.modes = modes
        self.__dict__["io"] = io

    def bind(self, names: tuple[str, ...]) -> StepProgram:
        """Fix the order of the inputs. torch.export names the inputs after the parameters of forward."""
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        signature = inspect.Signature(parameters)

        def forward(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
            return self.run(dict(signature.bind(*args, **kwargs).arguments), recording=False)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward
        return self

    def run(self, inputs: Mapping[str, Tensor], recording: bool) -> tuple[Tensor, ...]:
        """All results, (B, ...) each. With `recording`, the `StepIO` records the policy's requests."""
        batch = next(iter(inputs.values())).shape[0]
        self.io.begin(batch, None if recording else inputs)
        runs = [self._act(mode, inputs, batch, recording) for mode in self.modes]
        if len(runs) == 1:
            return runs[0]
        explore = torch.zeros(batch, dtype=torch.bool) if recording else inputs[EXPLORE.name]
        # Contiguous, because a runtime does not check strides.
        return tuple(_choose(explore, random, sure).contiguous() for sure, random in zip(*runs, strict=True))

    def _act(self, mode: Exploration, inputs: Mapping[str, Tensor], batch: Any, recording: bool) -> tuple[Tensor, ...]:
        tensordict = TensorDict({}, batch_size=[batch])
        for name, key in self.layout.observations.items():
            tensordict.set(key, inputs[name])
        for name, (key, _) in self.layout.states.items():
            tensordict.set(key, inputs[name])
        if self.layout.is_init:
            tensordict.set(IS_INIT.name, self.io.is_init().reshape(-1, *self.layout.is_init_shape))
        self.io.next_states = {}
        with set_exploration_type(MODES[mode]), NoiseFromInputs(self.io):
            result: TensorDictBase = self.policy(tensordict)
        outputs = [_get(result, key) for key in self.layout.outputs.values()]
        outputs += [_get(result, written) for _, written in self.layout.states.values()]
        if not recording:  # a deterministic step does not change the state of a noise process
            outputs += [self.io.next_states.get(name, inputs[name]) for name in self.io.states]
        return tuple(tensor.contiguous() for tensor in outputs)


def _choose(explore: Tensor, random: Tensor, sure: Tensor) -> Tensor:
    if random.shape != sure.shape or random is sure:
        return sure
    return torch.where(explore.reshape(-1, *[1] * (random.ndim - 1)), random, sure)


def _get(result: TensorDictBase, key: Key) -> Tensor:
    value = result.get(key, None)
    if value is None:
        raise CaptureFailed(f"the policy was expected to write {key!r}; it wrote {list(result.keys(True, True))}")
    tensor: Tensor = value
    return tensor


@dataclass(frozen=True)
class TracedPolicy:
    """`program` is the traced policy; `reference` runs the policy eagerly. The program must repeat its results."""

    program: torch.export.ExportedProgram
    reference: nn.Module
    signature: Signature
    layout: Layout
    runtimes: ClassVar[tuple[str, ...]] = ("onnx", "pt2")

    def run_reference(self, inputs: Mapping[str, Any]) -> Arrays:
        """The results of the policy, run eagerly. `inputs` by name, each (B, *shape)."""
        tensors = [torch.from_numpy(inputs[spec.name]) for spec in self.signature.inputs]
        with torch.no_grad(), set_composite_lp_aggregate(False):
            outputs = self.reference(*tensors)
        return {spec.name: tensor.numpy() for spec, tensor in zip(self.signature.results, outputs, strict=True)}

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
        save_program(self.program, folder / PROGRAM, {file: (folder / file).read_bytes() for file in portable})
        return {PROGRAM: folder / PROGRAM}

    def build(self, runtime: str, folder: Path, target: Mapping[str, Any]) -> Program:
        """Rewrite the graph for one runtime and build its program file in `folder`."""
        program, rewrites = optimize(self.program, runtime)
        file = f"policy.{runtime}"
        if runtime == "onnx":
            from actserve_export.programs.onnx import convert_program

            requires = convert_program(program, self.signature, folder / file)
        else:
            from actserve_export.programs.aoti import compile_program

            requires = compile_program(program, folder / file, **target)
        return Program(file, requires, tuple(rewrites))


def capture_policy(source: PolicySource) -> TracedPolicy:
    """Trace one step of the policy with a symbolic batch of 1 to `MAX_BATCH`, or if that fails, for one item at a time.

    Raises `CaptureFailed`.
    """
    io = StepIO()
    policy = swap(source.policy, io).eval()
    layout = _layout(source, policy)
    items = {name: source.example.get(key) for name, key in layout.observations.items()}
    items |= {name: source.example.get(read) for name, (read, _) in layout.states.items()}
    with torch.no_grad(), set_composite_lp_aggregate(False):
        program = StepProgram(policy, io, layout, _modes(policy, io, layout, items, source.exploration))
        results = _record(program, items)
        signature = _signature(program, items, results)
        program.bind(tuple(spec.name for spec in signature.inputs))
        try:
            exported = trace(program, signature, TRACED_BATCH)
        except CaptureFailed as error:
            log.warning("exported one item at a time; with a batch the export failed: %s", error.message)
            signature = replace(signature, max_batch=1)
            exported = trace(program, signature, 1)
    return TracedPolicy(exported, program, signature, layout)


def _layout(source: PolicySource, policy: nn.Module) -> Layout:
    """Sort the policy's keys into observations, state and outputs."""
    steps = modules_in_order(policy)
    reads, writes = reads_and_writes(steps)
    # A transform that writes the key it reads prepares an observation. A module that does so carries state.
    carried = {key for step in steps if not isinstance(step, (Transform, StepModule)) for key in step.out_keys}
    present = set(source.example.keys(include_nested=True, leaves_only=True))
    needed = [key for key in reads if last_part(key) != IS_INIT.name]
    if missing := [key for key in needed if key not in present]:
        raise CaptureFailed(f"the policy reads {missing}, which the example lacks; it has {sorted(map(str, present))}")
    written = {key: after for key in needed for after in (_next(key), key) if after in carried and after in writes}
    names = keys_by_name(needed, "input")
    init = source.example.get(IS_INIT.name, None)
    return Layout(
        observations={name: key for name, key in names.items() if key not in written},
        states={name: (key, written[key]) for name, key in names.items() if key in written},
        outputs=keys_by_name(source.outputs or _outputs(source.policy, steps, set(written.values())), "output"),
        is_init=len(needed) < len(reads),
        is_init_shape=() if init is None else tuple(init.shape),
    )


def modules_in_order(policy: nn.Module) -> list[Any]:
    """The tensordict modules that a policy runs, in order."""
    children = policy.module if isinstance(policy, TensorDictSequential) else getattr(policy, "steps", None)
    if children is None:
        return [policy]
    return [found for child in children for found in modules_in_order(child)]


def _next(key: Key) -> Key:
    return ("next", *((key,) if isinstance(key, str) else key))


def _outputs(policy: Any, steps: list[Any], state: set[Key]) -> list[Key]:
    """The action first, then `KNOWN_OUTPUTS`. A policy without an action gives all its outputs."""
    state = state | {key for step in steps for key in getattr(step, "state_keys", ())}
    written = [key for key in policy.out_keys if key not in state and key_name(key) not in map(key_name, state)]
    actions = [key for key in written if last_part(key) == "action"]
    return [*actions, *(key for key in written if last_part(key) in KNOWN_OUTPUTS)] if actions else written


def _modes(
    policy: nn.Module, io: StepIO, layout: Layout, items: Mapping[str, Tensor], wanted: tuple[Exploration, ...] | None
) -> tuple[Exploration, ...]:
    """The policy's modes: random only if it then draws, deterministic only if the policy defines it."""
    if wanted is not None:
        return wanted
    _record(StepProgram(policy, io, layout, ("random",)), items)
    if not io.noises:
        return ("deterministic",)
    try:
        _record(StepProgram(policy, io, layout, ("deterministic",)), items)
    except CaptureFailed as error:
        log.warning("this policy only acts at random; deterministic mode failed: %s", error.message)
        return ("random",)
    return ("deterministic", "random")


def _record(program: StepProgram, items: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The results of one eager call. It initialises lazy layers and records the requests to `StepIO`."""
    program.io.clear()
    examples = {name: item.expand(TRACED_BATCH, *item.shape).contiguous() for name, item in items.items()}
    try:
        results = program.run(examples, recording=True)
    except CaptureFailed:
        raise
    except Exception as error:
        raise CaptureFailed(f"the policy cannot run its own example: {one_line(error)}") from error
    for name, tensor in zip(program.layout.outputs, results, strict=False):
        if tensor.shape[:1] != (TRACED_BATCH,):
            raise CaptureFailed(f"{name}: expected the batch first; got the shape {tuple(tensor.shape)}")
    return results


def _signature(program: StepProgram, items: Mapping[str, Tensor], results: tuple[Tensor, ...]) -> Signature:
    layout, io = program.layout, program.io
    states = [State(_spec(name, items[name]), f"next_{name}") for name in layout.states]
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


def _spec(name: str, item: Tensor) -> TensorSpec:
    return TensorSpec(name, dtype_name(name, item.dtype), tuple(item.shape))
