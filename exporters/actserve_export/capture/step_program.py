"""StepProgram: a tensordict policy as a function of tensors, batch first. It is traced, and it is the reference."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from actserve.core.errors import CaptureFailed
from actserve.core.signature import EXPLORE, IS_INIT, Exploration
from actserve_export.capture.decompositions import where
from actserve_export.capture.layout import Layout
from actserve_export.capture.log_prob import Check
from actserve_export.capture.noise import NoiseFromInputs
from actserve_export.capture.step_io import StepIO
from actserve_export.sources.keys import Key, key_name
from actserve_export.sources.tensors import widened

MODES: dict[Exploration, Any] = {"deterministic": ExplorationType.DETERMINISTIC, "random": ExplorationType.RANDOM}


class StepProgram(nn.Module):
    """A tensordict policy as a function of tensors: the signature's inputs -> its results, (B, ...) each."""

    def __init__(self, policy: nn.Module, io: StepIO, layout: Layout, modes: tuple[Exploration, ...]) -> None:
        super().__init__()
        self.policy = policy
        self.layout = layout
        self.modes = modes
        self.watching: list[Check] = []
        self.halves: set[str] = set()  # inputs that the policy takes as bfloat16, and the program as float32
        self.__dict__["io"] = io

    def bind(self, names: tuple[str, ...]) -> StepProgram:
        """Fix the order of the inputs. torch.export names the inputs after the parameters of forward."""
        self.__dict__["forward"] = named_forward(names, partial(self.run, recording=False))
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
        given = {name: x.bfloat16() if name in self.halves else x for name, x in inputs.items()}
        given = {name: x.clone() if name in self.io.overwritten else x for name, x in given.items()}
        tensordict = self.layout.tensordict(given, batch)
        if self.layout.is_init:
            tensordict.set(IS_INIT.name, self.io.is_init().reshape(-1, *self.layout.is_init_shape))
        self.io.next_states = {}
        self.io.deterministic = mode == "deterministic"
        with set_exploration_type(MODES[mode]), NoiseFromInputs(self.io):
            result: TensorDictBase = self.policy(tensordict)
            for watch in self.watching:
                watch(result)
        outputs = [_get(result, key) for key in self.layout.outputs.values()]
        outputs += [_get(result, written) for _, written in self.layout.states.values()]
        if not recording:  # a deterministic step does not change the state of a noise process
            outputs += [self.io.next_states.get(name, inputs[name]) for name in self.io.states]
            outputs = list(map(widened, outputs))
        return tuple(tensor.contiguous() for tensor in outputs)


def named_forward(
    names: tuple[str, ...], run: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
) -> Callable[..., tuple[Tensor, ...]]:
    """`run` as a function of positional tensors with these names."""
    identifiers = _identifiers(names)
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in identifiers]
    signature = inspect.Signature(parameters)

    def forward(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        bound = signature.bind(*args, **kwargs).arguments
        return run({name: bound[known] for name, known in zip(names, identifiers, strict=True)})

    # torch.export names inputs by `inspect.signature`, which reads this attribute. mypy knows none on functions.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _identifiers(names: Sequence[str]) -> list[str]:
    """Python identifiers for names of any kind, each once."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", name)
        if not plain.isidentifier() or keyword.iskeyword(plain) or plain == "self":
            plain = f"input_{plain}"
        while plain in found:
            plain += "_"
        found.append(plain)
    return found


def _choose(explore: Tensor, random: Tensor, sure: Tensor) -> Tensor:
    if random.shape != sure.shape or random is sure:
        return sure
    return where(explore.reshape(-1, *[1] * (random.ndim - 1)), random, sure)


def _get(result: TensorDictBase, key: Key) -> Tensor:
    value = result.get(key, None)
    if value is None:
        raise CaptureFailed(f"the policy was expected to write {key!r}; it wrote {list(result.keys(True, True))}")
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        kind = f"a tensor that is {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise CaptureFailed(f"{key_name(key)}: expected a plain tensor; the policy gives {kind}")
    return value
