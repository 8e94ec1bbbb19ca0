"""Replay: recorded steps on any version of their policy.

The state is computed anew from the start of each episode, and the noise from the seeds. So the version that was
recorded gives the same outputs bit for bit. Steps of several episodes run in one batch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

import numpy as np

from actserve.core.completion import draw_noise
from actserve.core.errors import UsageError
from actserve.core.limits import LIMITED, Reason, by_reason
from actserve.core.signature import EXPLORE, IS_INIT, Array, Arrays, Exploration, Signature
from actserve.engine.golden import Tolerance, agreeing
from actserve.recording.reader import Step
from actserve.recording.rows import OBSERVATION, OUTPUT, PARAMETER, STATE

SCORES = ("action_value", "logits")  # outputs whose two largest entries decide the action


class Actor(Protocol):
    """Acts on recorded steps."""

    signature: Signature
    max_batch: int

    def act(self, steps: Sequence[Step], state: Arrays) -> Arrays:
        """Act on at most `max_batch` steps with the state that each begins with, (B, *shape) by name.

        Returns the outputs, and the new state under the names of the inputs that it replaces, each (B, *shape).
        """


class ProgramActor:
    """Acts with a program of this process. `run` is that of a runtime."""

    def __init__(self, signature: Signature, run: Callable[[Arrays], Arrays], max_batch: int = 32) -> None:
        self.signature, self._run = signature, run
        self.max_batch = min(max_batch, signature.max_batch)

    def act(self, steps: Sequence[Step], state: Arrays) -> Arrays:
        signature = self.signature
        inputs = _stacked(steps, OBSERVATION, [spec.name for spec in signature.observations]) | state
        if signature.is_init:
            inputs[IS_INIT.name] = np.array([begins(step) for step in steps])
        for parameter in signature.parameters:
            values = [step.tensors.get(PARAMETER + parameter.name, parameter.default) for step in steps]
            inputs[parameter.name] = np.array(values, np.float32)
        modes = [mode_of(step, signature) for step in steps]
        if len(signature.exploration) > 1:
            inputs[EXPLORE.name] = np.array([mode == "random" for mode in modes])
        noise = [_noise(step, mode, signature) for step, mode in zip(steps, modes, strict=True)]
        inputs |= {each.spec.name: np.concatenate([item[each.spec.name] for item in noise]) for each in signature.noise}
        results = self._run(inputs)
        new = {each.spec.name: results[each.output] for each in signature.state}
        return {name: results[name] for name in signature.output_names} | new


def begins(step: Step) -> bool:
    """Whether the step was the first one of its episode."""
    flag = step.tensors.get(IS_INIT.name)
    return step.follows == 0 if flag is None else bool(flag)


def mode_of(step: Step, signature: Signature) -> Exploration:
    """The exploration of the step, or the policy's default if it does not have that mode."""
    return step.exploration if step.exploration in signature.exploration else signature.exploration[0]


def _noise(step: Step, mode: Exploration, signature: Signature) -> Arrays:
    """The noise of a step, each (1, *shape). A step without a seed had none; the seed is 0 where this version has."""
    if not signature.draws(mode):
        return {noise.spec.name: noise.spec.zeros(1) for noise in signature.noise}
    return draw_noise(signature.noise, step.seed or 0, 1, step.item)


def _stacked(steps: Sequence[Step], prefix: str, names: Iterable[str]) -> Arrays:
    return {name: np.stack([step.tensors[prefix + name] for step in steps]) for name in names}


class Player:
    """Plays recorded steps on `actor`, and keeps the state of each episode. `recorded` is the recording's signature.

    `skipped` counts the steps that cannot be played: the step before is missing, or their state has another form.
    Raises `UsageError` if the actor takes other observations than the recorded ones.
    """

    def __init__(self, actor: Actor, recorded: Signature) -> None:
        self.actor = actor
        self.skipped = 0
        self._states: dict[tuple[str, str], tuple[int, Arrays]] = {}  # each (*shape), after the step
        ours, theirs = ({spec.name: str(spec) for spec in s.observations} for s in (actor.signature, recorded))
        if ours != theirs:
            raise UsageError(f"expected a policy that takes what was recorded, {theirs}; this one takes {ours}")

    def play(self, steps: Sequence[Step]) -> Iterator[tuple[list[Step], Arrays]]:
        """Batches of steps, and the outputs of each batch, (B, *shape). The steps of an episode come in order.

        The next call goes on where the last one ended.
        """
        waiting: dict[tuple[str, str], deque[Step]] = {}
        for step in steps:
            waiting.setdefault(_key(step), deque()).append(step)
        while waiting:
            batch, states = [], []
            for key in list(waiting)[: self.actor.max_batch]:
                step = waiting[key].popleft()
                if not waiting[key]:
                    del waiting[key]
                state = self._state(step)
                if state is None:
                    self.skipped += 1
                else:
                    batch.append(step)
                    states.append(state)
            if batch:
                yield batch, self._act(batch, states)

    def _act(self, batch: list[Step], states: list[Arrays]) -> Arrays:
        specs = [state.spec for state in self.actor.signature.state]
        results = self.actor.act(batch, {spec.name: np.stack([s[spec.name] for s in states]) for spec in specs})
        for row, step in enumerate(batch):
            if specs and not step.is_last:
                self._states[_key(step)] = step.step, {spec.name: results[spec.name][row] for spec in specs}
        return {name: results[name] for name in self.actor.signature.output_names}

    def _state(self, step: Step) -> Arrays | None:
        """The state that a step begins with, each (*shape); None if it is not known."""
        signature = self.actor.signature
        before, state = self._states.pop(_key(step), (None, {}))
        if not signature.state or (before is not None and before == step.follows):
            return state
        if begins(step) and (step.follows == 0 or signature.is_init):
            return {each.spec.name: each.initial_value(1)[0] for each in signature.state}
        found = {each.spec.name: step.tensors.get(STATE + each.spec.name) for each in signature.state}
        known = {name: array for name, array in found.items() if array is not None}
        fits = all(
            each.spec.name in known and (known[each.spec.name].shape, known[each.spec.name].dtype)
            == (each.spec.shape, each.spec.numpy_dtype)
            for each in signature.state
        )  # fmt: skip
        return known if fits else None


def _key(step: Step) -> tuple[str, str]:
    return step.writer, step.episode


@dataclass(frozen=True)
class Divergence:
    """A step whose action was another one in the replay."""

    episode: str
    step: int
    time: datetime
    version: int  # that was recorded
    recorded: Arrays  # outputs, each (*shape)
    replayed: Arrays
    observations: Arrays

    def lead(self, outputs: Arrays) -> float | None:
        """The lead of the best action over the next best; None if there are no scores."""
        scores = next((outputs[name] for name in SCORES if name in outputs and outputs[name].shape[-1:] > (1,)), None)
        if scores is None:
            return None
        ordered = np.sort(np.asarray(scores, np.float64), axis=-1)
        return float(np.min(ordered[..., -1] - ordered[..., -2]))

    def as_json(self, action: str) -> dict[str, Any]:
        return {
            "episode": self.episode,
            "step": self.step,
            "time": self.time.isoformat(),
            "version": self.version,
            "actions": [self.recorded[action].tolist(), self.replayed[action].tolist()],
            "leads": [self.lead(self.recorded), self.lead(self.replayed)],
        }

    def tensors(self) -> Arrays:
        """The observations and both outputs, for a file."""
        named = {OBSERVATION: self.observations, "recorded.": self.recorded, "replayed.": self.replayed}
        return {prefix + name: np.array(array) for prefix, arrays in named.items() for name, array in arrays.items()}


@dataclass
class LimitedSteps:
    """How often the limits of a policy acted. `steps` counts those of a policy that has limits."""

    steps: int = 0
    limited: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)  # a step may have several

    def add(self, limited: Array) -> None:
        """`limited` is the output of this name, (B,)."""
        self.steps += len(limited)
        self.limited += int(np.count_nonzero(limited))
        self.reasons.update(by_reason(limited))

    def as_json(self) -> dict[str, int] | None:
        """None: no step was of a policy with limits."""
        if not self.steps:
            return None
        return {"steps": self.steps, "limited": self.limited} | {r.label: self.reasons[r] for r in Reason}


@dataclass
class Comparison:
    """The recorded outputs, compared with those of the replay."""

    signature: Signature
    steps: int = 0
    same: int = 0  # steps with the same action; a continuous one within the tolerance of certificates
    identical: int = 0  # steps whose outputs are all the same, bit for bit
    first: Divergence | None = None  # the earliest one
    recorded_limits: LimitedSteps = field(default_factory=LimitedSteps)
    replayed_limits: LimitedSteps = field(default_factory=LimitedSteps)

    @property
    def share(self) -> float:
        """The share of steps with the same action; 0 if there are no steps."""
        return self.same / self.steps if self.steps else 0.0

    def add(self, batch: Sequence[Step], outputs: Arrays) -> None:
        """Compare the `outputs` of a batch, each (B, *shape), with the recorded ones."""
        names = [name for name in outputs if all(OUTPUT + name in step.tensors for step in batch)]
        recorded = _stacked(batch, OUTPUT, names)
        action = self.signature.action
        same = agreeing(outputs[action.name], recorded[action.name], Tolerance().of(action))
        self.steps += len(batch)
        self.same += int(same.sum())
        if LIMITED in outputs:
            self.replayed_limits.add(outputs[LIMITED])
        limited = [step.tensors[OUTPUT + LIMITED] for step in batch if OUTPUT + LIMITED in step.tensors]
        if limited:
            self.recorded_limits.add(np.stack(limited))
        self.identical += int(np.all([_identical(outputs[name], recorded[name]) for name in names], axis=0).sum())
        for row in map(int, np.flatnonzero(~same)):
            step = batch[row]
            if self.first is None or step.time < self.first.time:
                self.first = Divergence(
                    step.episode, step.step, step.time, step.version,
                    {name: array[row] for name, array in recorded.items()},
                    {name: outputs[name][row] for name in names},
                    {spec.name: step.tensors[OBSERVATION + spec.name] for spec in self.signature.observations},
                )  # fmt: skip


def _identical(one: Array, other: Array) -> Array:
    """Whether each item has the same bytes, (B,) bool."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return np.zeros(len(one), bool)
    packed = [np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8) for array in (one, other)]
    return np.asarray((packed[0] == packed[1]).all(axis=1))
