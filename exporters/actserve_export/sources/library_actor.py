"""What policies of other libraries have in common: one step as a function of tensors, with their memory as state."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchrl.envs.utils import ExplorationType, exploration_type

from actserve.core.environment import Contract
from actserve.core.errors import CaptureFailed
from actserve.core.signature import IS_INIT, Arrays
from actserve_export.sources.interfaces import OriginalPolicy
from actserve_export.sources.policy_source import ArrayLike, PolicySource, as_tensors

Tensors: TypeAlias = dict[str, Tensor]
Examples: TypeAlias = Mapping[str, ArrayLike] | TensorDictBase


class LibraryActor(nn.Module):
    """Observations and state, (B, *shape) each -> action, new state, scores.

    A policy with state also takes `is_init`, (B,) bool. A subclass defines `step` and `act`.
    """

    def __init__(
        self, observations: Mapping[str, Tensor], state: Mapping[str, Tensor], scores: Sequence[str] = ()
    ) -> None:
        """`observations` and `state`: one item of each, by name. Episodes begin with this state."""
        super().__init__()
        self.observations, self.state = list(observations), list(state)
        self.items = {**observations, **state}
        self.in_keys = [*self.items, *([IS_INIT.name] if state else [])]
        self.out_keys: list[Any] = ["action", *(("next", name) for name in state), *scores]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.in_keys, inputs, strict=True))
        seen, state = ({name: given[name] for name in names} for names in (self.observations, self.state))
        deterministic = exploration_type() not in (ExplorationType.RANDOM, None)
        begins = given[IS_INIT.name].reshape(-1) if self.state else None
        action, after, *scores = self.step(seen, state, begins, deterministic)
        return (action, *(after[name] for name in self.state), *scores)

    @abstractmethod
    def step(self, seen: Tensors, state: Tensors, begins: Tensor | None, deterministic: bool) -> tuple[Any, ...]:
        """(action, new state by name, scores), (B, ...) each."""

    @abstractmethod
    def act(self, seen: Tensors, state: Tensors, begins: Tensor | None, noise: list[Tensor]) -> tuple[Tensor, Tensors]:
        """(action, new state) as the library itself acts, deterministically or with this noise."""

    def source(self, library: str, call: str, environment: Contract | None, **more: Any) -> PolicySource:
        """`call`: what `act` does, for the certificate. `more`: further attributes of the source."""

        def original(inputs: Arrays) -> Arrays:
            given = {name: torch.from_numpy(array) for name, array in inputs.items()}
            seen, state = ({name: given[name] for name in names} for names in (self.observations, self.state))
            noise = [given[name] for name in sorted(given.keys() - {*self.in_keys}, key=_number) if "noise" in name]
            with torch.no_grad():
                action, after = self.act(seen, state, given.get(IS_INIT.name), noise)
            return {"action": action.numpy()} | {f"next_{name}": tensor.numpy() for name, tensor in after.items()}

        return PolicySource(
            TensorDictModule(self, in_keys=self.in_keys, out_keys=self.out_keys),
            TensorDict(self.items),
            library=library,
            original=OriginalPolicy(f"{library}, {call}", original),
            environment=environment,
            **more,
        )


class RecurrentActor(LibraryActor):
    """A policy whose state is what RNNs carry, (layers, units) each. It is zero where an episode begins.

    A subclass defines `run` and `run_library`. Without RNNs their memory is empty.
    """

    def __init__(
        self, observations: Mapping[str, Tensor], memory: Mapping[str, tuple[int, int]], scores: Sequence[str] = ()
    ) -> None:
        super().__init__(observations, {name: torch.zeros(shape) for name, shape in memory.items()}, scores)

    def step(self, seen: Tensors, state: Tensors, begins: Tensor | None, deterministic: bool) -> tuple[Any, ...]:
        memory = [tensor.transpose(0, 1) for tensor in state.values()]
        if begins is not None:
            memory = [torch.where(begins.reshape(1, -1, 1), 0.0, tensor).contiguous() for tensor in memory]
        action, after, *scores = self.run(seen, memory, deterministic)
        return (action, self._by_name(after), *scores)

    def act(self, seen: Tensors, state: Tensors, begins: Tensor | None, noise: list[Tensor]) -> tuple[Tensor, Tensors]:
        memory = [tensor.transpose(0, 1).contiguous() for tensor in state.values()]
        begins = torch.zeros(len(next(iter(seen.values()))), dtype=torch.bool) if begins is None else begins
        action, after = self.run_library(seen, memory, begins)
        return action, self._by_name(after)

    def _by_name(self, memory: Sequence[Tensor]) -> Tensors:
        return {name: tensor.transpose(0, 1) for name, tensor in zip(self.state, memory, strict=True)}

    @abstractmethod
    def run(self, seen: Tensors, memory: list[Tensor], deterministic: bool) -> tuple[Any, ...]:
        """(action, (B, ...); new memory, (layers, B, units) each; scores)."""

    @abstractmethod
    def run_library(self, seen: Tensors, memory: list[Tensor], begins: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """(action, new memory) as the library itself acts; it resets its memory where `begins`."""


def _number(name: str) -> int:
    """The place of a noise input: `noise`, `noise_1`, `noise_2`, …"""
    return int(name.rpartition("_")[2]) if name[-1].isdigit() else 0


def titled(title: str, distribution: str) -> str:
    """The library's name with its version, for the certificate."""
    try:
        return f"{title} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return title


def one_item(given: Examples, shapes: Mapping[str, int]) -> dict[str, Tensor]:
    """One item of each observation in `shapes`, which has its number of axes, from items or batches by name.

    Raises `CaptureFailed` for an observation that is missing or has another number of axes.
    """
    found = as_tensors(given)
    items = {}
    for name, axes in shapes.items():
        tensor = found.get(name)
        if not isinstance(tensor, Tensor):
            raise CaptureFailed(f"the policy reads {name}; the example has {', '.join(map(str, found)) or 'nothing'}")
        if tensor.ndim not in (axes, axes + 1) or (tensor.ndim > axes and not len(tensor)):
            raise CaptureFailed(f"{name}: expected {axes} axes, or {axes + 1} with a batch; got {list(tensor.shape)}")
        items[name] = (tensor if tensor.ndim == axes else tensor[0]).detach().clone()
    return items


def fresh_copy(module: nn.Module) -> Any:
    """A copy on the CPU, in evaluation mode, without the results of the last call that the module keeps.

    Those are distributions, and tensors with a history, which cannot be copied.
    """
    kept = {
        id(value): None
        for part in module.modules()
        for value in vars(part).values()
        if any(map(_is_result, value if isinstance(value, (tuple, list)) else [value]))
    }
    copied = copy.deepcopy(getattr(module, "_orig_mod", module), kept).cpu().eval().requires_grad_(False)
    for part in copied.modules():
        vars(part).update({name: value.cpu() for name, value in vars(part).items() if isinstance(value, Tensor)})
    return copied


def _is_result(value: Any) -> bool:
    return isinstance(value, torch.distributions.Distribution) or (isinstance(value, Tensor) and not value.is_leaf)


@contextmanager
def restored(*modules: nn.Module | None) -> Iterator[None]:
    """Restore the attributes of `modules` afterwards: hidden state that is given to them, and distributions."""
    before = [(module, dict(vars(module))) for module in modules if module is not None]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


class WithoutDraws(TorchFunctionMode):
    """While a policy runs: a normal number is its mean, and a choice is the most likely one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.normal:
            return torch.zeros_like(args[1]) + args[0]
        if func is Tensor.normal_:
            return args[0].fill_((args[1:] or (0.0,))[0])
        if func in (torch.multinomial, Tensor.multinomial):
            return args[0].argmax(-1, keepdim=True)
        return func(*args, **(kwargs or {}))
