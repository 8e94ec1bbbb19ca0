"""TorchRL module -> ExportedProgram with a Signature: what is traced is a function of named arrays, batch first."""

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
from actserve_export.capture.noise import Lifted
from actserve_export.capture.ports import Ports, dtype_name
from actserve_export.capture.steps import StepModule
from actserve_export.capture.swaps import reads_and_writes, swap
from actserve_export.capture.trace import MAX_BATCH, trace
from actserve_export.programs.exported import PROGRAM, save_program
from actserve_export.programs.rewrites.optimize import optimize
from actserve_export.sources.keys import Key, join, leaf, named
from actserve_export.sources.policy_source import PolicySource

log = logging.getLogger("actserve")
TRACED_BATCH = 64  # a traced batch of 1 is taken for a constant, and AOTInductor picks branches by the example
# Outputs that are given beside the action where a policy writes them.
KNOWN_OUTPUTS = ("action_value", "logits", "loc", "scale", "state_value", "action_log_prob", "sample_log_prob")
MODES: dict[Exploration, Any] = {"deterministic": ExplorationType.DETERMINISTIC, "random": ExplorationType.RANDOM}


@dataclass(frozen=True)
class Layout:
    """Where a program's tensors live in the policy's tensordict."""

    observations: dict[str, Key]  # by name
    states: dict[str, tuple[Key, Key]]  # name -> (the key read, the key written)
    outputs: dict[str, Key]
    is_init: bool  # the policy itself reads "is_init"
    is_init_shape: tuple[int, ...]


class StepProgram(nn.Module):
    """A tensordict policy as a function of tensors: the signature's inputs, (B, ...) each, to its results."""

    def __init__(self, policy: nn.Module, ports: Ports, layout: Layout, modes: tuple[Exploration, ...]) -> None:
        super().__init__()
        self.policy = policy
        self.layout = layout
        self.modes = modes
        self.__dict__["ports"] = ports

    def bind(self, names: tuple[str, ...]) -> StepProgram:
        """Fix the order of the inputs; torch.export names the program's inputs after the parameters of forward."""
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        signature = inspect.Signature(parameters)

        def forward(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
            return self.run(dict(signature.bind(*args, **kwargs).arguments), noting=False)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward
        return self

    def run(self, inputs: Mapping[str, Tensor], noting: bool) -> tuple[Tensor, ...]:
        """All results; with `noting` the ports note what the policy asks for beside the observations."""
        batch = next(iter(inputs.values())).shape[0]
        self.ports.begin(batch, None if noting else inputs)
        runs = [self._act(mode, inputs, batch, noting) for mode in self.modes]
        if len(runs) == 1:
            return runs[0]
        explore = torch.zeros(batch, dtype=torch.bool) if noting else inputs[EXPLORE.name]
        # Contiguous, because a program's reader takes strides on trust.
        return tuple(_choose(explore, random, sure).contiguous() for sure, random in zip(*runs, strict=True))

    def _act(self, mode: Exploration, inputs: Mapping[str, Tensor], batch: Any, noting: bool) -> tuple[Tensor, ...]:
        tensordict = TensorDict({}, batch_size=[batch])
        for name, key in self.layout.observations.items():
            tensordict.set(key, inputs[name])
        for name, (key, _) in self.layout.states.items():
            tensordict.set(key, inputs[name])
        if self.layout.is_init:
            tensordict.set(IS_INIT.name, self.ports.is_init().reshape(-1, *self.layout.is_init_shape))
        self.ports.given = {}
        with set_exploration_type(MODES[mode]), Lifted(self.ports):
            result: TensorDictBase = self.policy(tensordict)
        outputs = [_get(result, key) for key in self.layout.outputs.values()]
        outputs += [_get(result, written) for _, written in self.layout.states.values()]
        if not noting:  # a deterministic step leaves the noise process where it is
            outputs += [self.ports.given.get(name, inputs[name]) for name in self.ports.states]
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
class Captured:
    """`program` is what is compiled; `reference` is the policy itself, run eagerly: what the program must repeat."""

    program: torch.export.ExportedProgram
    reference: nn.Module
    signature: Signature
    layout: Layout
    runtimes: ClassVar[tuple[str, ...]] = ("onnx", "pt2")

    def run_reference(self, inputs: Mapping[str, Any]) -> Arrays:
        """The policy's own answers, eagerly. `inputs` by name, each (B, *shape)."""
        tensors = [torch.from_numpy(inputs[spec.name]) for spec in self.signature.inputs]
        with torch.no_grad(), set_composite_lp_aggregate(False):
            outputs = self.reference(*tensors)
        return {spec.name: tensor.numpy() for spec, tensor in zip(self.signature.results, outputs, strict=True)}

    def graph(self) -> str:
        """The graph as torch prints it, without the folders of the machine that it was traced on."""
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


def capture_policy(source: PolicySource) -> Captured:
    """Trace one step of the policy with a symbolic batch of 1 to `MAX_BATCH`; what resists, one item at a time.

    Raises `CaptureFailed`.
    """
    ports = Ports()
    policy = swap(source.policy, ports).eval()
    layout = _layout(source, policy)
    items = {name: source.example.get(key) for name, key in layout.observations.items()}
    items |= {name: source.example.get(read) for name, (read, _) in layout.states.items()}
    with torch.no_grad(), set_composite_lp_aggregate(False):
        program = StepProgram(policy, ports, layout, _modes(policy, ports, layout, items, source.exploration))
        results = _note(program, items)
        signature = _signature(program, items, results)
        program.bind(tuple(spec.name for spec in signature.inputs))
        try:
            exported = trace(program, signature, TRACED_BATCH)
        except CaptureFailed as error:
            log.warning("exported one item at a time, because with a batch %s", error.message)
            signature = replace(signature, max_batch=1)
            exported = trace(program, signature, 1)
    return Captured(exported, program, signature, layout)


def _layout(source: PolicySource, policy: nn.Module) -> Layout:
    """Sort the policy's keys into observations, state and outputs."""
    steps = leaves(policy)
    reads, writes = reads_and_writes(steps)
    # A transform that writes what it read prepares an observation; a module that does carries state.
    carried = {key for step in steps if not isinstance(step, (Transform, StepModule)) for key in step.out_keys}
    present = set(source.example.keys(include_nested=True, leaves_only=True))
    needed = [key for key in reads if leaf(key) != IS_INIT.name]
    if missing := [key for key in needed if key not in present]:
        raise CaptureFailed(f"the policy reads {missing}, which the example lacks; it has {sorted(map(str, present))}")
    written = {key: after for key in needed for after in (_next(key), key) if after in carried and after in writes}
    names = named(needed, "input")
    init = source.example.get(IS_INIT.name, None)
    return Layout(
        observations={name: key for name, key in names.items() if key not in written},
        states={name: (key, written[key]) for name, key in names.items() if key in written},
        outputs=named(source.outputs or _outputs(source.policy, steps, set(written.values())), "output"),
        is_init=len(needed) < len(reads),
        is_init_shape=() if init is None else tuple(init.shape),
    )


def leaves(policy: nn.Module) -> list[Any]:
    """The tensordict modules that a policy runs, in order."""
    children = policy.module if isinstance(policy, TensorDictSequential) else getattr(policy, "steps", None)
    if children is None:
        return [policy]
    return [found for child in children for found in leaves(child)]


def _next(key: Key) -> Key:
    return ("next", *((key,) if isinstance(key, str) else key))


def _outputs(policy: Any, steps: list[Any], state: set[Key]) -> list[Key]:
    """The action first, then what is known to be of use; of a policy without an action, all that it gives."""
    state = state | {key for step in steps for key in getattr(step, "state_keys", ())}
    given = [key for key in policy.out_keys if key not in state and join(key) not in map(join, state)]
    actions = [key for key in given if leaf(key) == "action"]
    return [*actions, *(key for key in given if leaf(key) in KNOWN_OUTPUTS)] if actions else given


def _modes(
    policy: nn.Module, ports: Ports, layout: Layout, items: Mapping[str, Tensor], wanted: tuple[Exploration, ...] | None
) -> tuple[Exploration, ...]:
    """How the policy can act: at random only if it then draws, deterministically only if that is defined."""
    if wanted is not None:
        return wanted
    _note(StepProgram(policy, ports, layout, ("random",)), items)
    if not ports.noises:
        return ("deterministic",)
    try:
        _note(StepProgram(policy, ports, layout, ("deterministic",)), items)
    except CaptureFailed as error:
        log.warning("this policy only acts at random: deterministically %s", error.message)
        return ("random",)
    return ("deterministic", "random")


def _note(program: StepProgram, items: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """One eager call: lazy layers are made, the ports note what is asked for, and outputs show their shapes."""
    program.ports.clear()
    examples = {name: item.expand(TRACED_BATCH, *item.shape).contiguous() for name, item in items.items()}
    try:
        results = program.run(examples, noting=True)
    except CaptureFailed:
        raise
    except Exception as error:
        raise CaptureFailed(f"the policy cannot run its own example: {one_line(error)}") from error
    for name, tensor in zip(program.layout.outputs, results, strict=False):
        if tensor.shape[:1] != (TRACED_BATCH,):
            raise CaptureFailed(f"{name}: expected the batch first; got the shape {tuple(tensor.shape)}")
    return results


def _signature(program: StepProgram, items: Mapping[str, Tensor], results: tuple[Tensor, ...]) -> Signature:
    layout, ports = program.layout, program.ports
    states = [State(_spec(name, items[name]), f"next_{name}") for name in layout.states]
    return Signature(
        observations=tuple(_spec(name, items[name]) for name in layout.observations),
        outputs=tuple(_spec(name, tensor[0]) for name, tensor in zip(layout.outputs, results, strict=False)),
        max_batch=MAX_BATCH,
        state=(*states, *ports.states.values()),
        is_init=ports.takes_is_init,
        exploration=program.modes,
        parameters=tuple(ports.parameters.values()),
        noise=tuple(ports.noises),
    )


def _spec(name: str, item: Tensor) -> TensorSpec:
    return TensorSpec(name, dtype_name(name, item.dtype), tuple(item.shape))
