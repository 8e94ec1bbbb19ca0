"""A limits file and a policy's signature -> `Limits`, and the signature of the policy that keeps to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actserve.core.errors import UsageError
from actserve.core.limits import LIMITED, Limits, OutputLimits
from actserve.core.signature import INFERENCE_DELAY, PREV_CHUNK, Array, Signature, State, TensorSpec
from actserve_export.sources.limited_actions import action_spec, starting_action
from actserve_export.sources.limits_file import HOLD, LARGEST, LimitsFile, OutputSection

_SCORES = ("action_value", "logits")
_FLOATS = ("float16", "float32", "float64")
_INTEGERS = ("uint8", "int8", "uint16", "int16", "int32", "int64")
_CONTINUOUS = ("low", "high", "change")


def limited_signature(signature: Signature, file: LimitsFile) -> Signature:
    """`signature` with the limits, the output `limited`, and the state that the limits need.

    Raises `UsageError` for limits that do not fit the outputs.
    """
    if LIMITED in signature.output_names:
        raise UsageError(f"limits: the policy has an output named {LIMITED}, a name that the limits need themselves")
    taken = {spec.name for spec in (*signature.inputs, *signature.results)}
    limits, states, outputs = [], [], list(signature.outputs)
    for name, section in file.outputs.items():
        index = _index(signature, name)
        limit = _OutputReader(signature, outputs[index], section).read(taken)
        limits.append(limit)
        states += _states(limit, action_spec(signature, limit.output))
        outputs[index] = _bounded(outputs[index], limit)
    return replace(
        signature,
        outputs=(*outputs, TensorSpec(LIMITED, "uint8", ())),
        state=(*signature.state, *states),
        is_init=signature.is_init or bool(states),
        limits=Limits(tuple(limits), file.finite_observations),
    )


def _index(signature: Signature, name: str) -> int:
    if name not in signature.output_names:
        raise UsageError(f"limits: {name}: no such output; the policy gives {', '.join(signature.output_names)}")
    return signature.output_names.index(name)


def _states(limit: OutputLimits, spec: TensorSpec) -> list[State]:
    """The previous action and, for `dwell`, its age."""
    if limit.previous is None:
        return []
    held = TensorSpec(limit.previous, spec.dtype, spec.shape)
    states = [State(held, f"next_{limit.previous}", starting_action(limit, spec))]
    if limit.age is not None:
        states.append(State(TensorSpec(limit.age, "int64", spec.shape), f"next_{limit.age}"))
    return states


def _bounded(spec: TensorSpec, limit: OutputLimits) -> TensorSpec:
    """An output with its bounds."""
    if limit.allowed is not None:
        return replace(spec, low=float(min(limit.allowed)), high=float(max(limit.allowed)))

    def bound(values: tuple[float, ...] | None) -> Any:
        if values is None or len(set(values)) == 1:
            return values and values[0]
        return values * (spec.elements // len(values))

    return replace(spec, low=bound(limit.low), high=bound(limit.high))


class _OutputReader:
    """Checks the section of one output and converts it. Raises `UsageError`."""

    def __init__(self, signature: Signature, output: TensorSpec, section: OutputSection) -> None:
        self.signature, self.output, self.section = signature, output, section
        self.spec = action_spec(signature, output.name)
        self.chunk = signature.chunk if signature.chunk and signature.chunk.output == output.name else None
        if output.dtype not in (*_FLOATS, *_INTEGERS):
            kinds = ", ".join((*_FLOATS, *_INTEGERS))
            raise UsageError(f"limits: {output.name}: expected an output of {kinds}; got {output.dtype}")

    def read(self, taken: set[str]) -> OutputLimits:
        """`taken` are names that new state cannot have; the names that it gets are added."""
        section = self.section
        discrete = section.allowed is not None or section.forbidden is not None or section.dwell is not None
        limit = self._discrete() if discrete else self._continuous()
        if limit.change is not None or limit.dwell is not None or limit.fallback == HOLD:
            self._refuse_change_of_chunks()
            limit = replace(limit, previous=_free(f"previous_{self.output.name}", taken))
        elif section.start is not None:
            raise UsageError(f"limits: {self.output.name}.start: expected change, dwell or fallback: hold beside it")
        if limit.dwell is not None:
            limit = replace(limit, age=_free(f"{self.output.name}_age", taken))
        return limit

    def _continuous(self) -> OutputLimits:
        low, high, change = self._bound("low"), self._bound("high"), self._bound("change")
        least = np.broadcast_to(-np.inf if low is None else low, self.spec.shape)
        most = np.broadcast_to(np.inf if high is None else high, self.spec.shape)
        if (least > most).any():
            raise self._wrong("low", f"at most {_text(most)}, which is high", least)
        if change is not None and (change <= 0).any():
            raise self._wrong("change", "more than 0", change)
        if change is not None and self.output.dtype in _INTEGERS and (low is None or high is None):
            raise UsageError(f"limits: {self.output.name}: change of whole numbers needs low and high, too")
        start, fallback = self._within("start", least, most), self._within("fallback", least, most)
        assert fallback is not None
        return OutputLimits(
            self.output.name,
            fallback,
            low=_row_major(low),
            high=_row_major(high),
            change=_row_major(change),
            start=start,
        )

    def _discrete(self) -> OutputLimits:
        section, name = self.section, self.output.name
        for key in _CONTINUOUS:
            if getattr(section, key) is not None:
                raise UsageError(f"limits: {name}.{key}: expected bounds, or allowed, forbidden and dwell; got both")
        if self.output.dtype not in _INTEGERS or self.chunk is not None:
            got = f"a chunk {self.output}" if self.chunk else str(self.output)
            raise UsageError(f"limits: {name}: expected whole numbers for allowed, forbidden and dwell; got {got}")
        scores = self._scores()
        count = None if scores is None else scores.shape[-1]
        if section.allowed is None and count is None:
            raise UsageError(
                f"limits: {name}: expected allowed: it is not known how many actions there are, because no output "
                f"({' or '.join(_SCORES)}) has a score for each"
            )
        most = self.spec.limits[1] if count is None else count - 1
        for key in ("allowed", "forbidden"):
            if (given := getattr(section, key)) is not None and max(given) > most:
                raise self._wrong(key, f"0 to {int(most)}", max(given))
        allowed = set(range(count or 0) if section.allowed is None else section.allowed) - set(section.forbidden or ())
        if not allowed:
            raise UsageError(f"limits: {name}: expected an action that is allowed; all are forbidden")
        values = np.array(sorted(allowed))
        start, fallback = self._among("start", values), self._among("fallback", values)
        assert fallback is not None
        return OutputLimits(
            name,
            fallback,
            start=start,
            allowed=tuple(values.tolist()),
            dwell=section.dwell,
            scores=None if scores is None else scores.name,
        )

    def _scores(self) -> TensorSpec | None:
        """The output that has a score for each value of this one."""
        if self.output is not self.signature.action:
            return None
        found = (spec for spec in self.signature.outputs if spec.name in _SCORES)
        return next((spec for spec in found if spec.shape[:-1] == self.spec.shape and spec.shape), None)

    def _refuse_change_of_chunks(self) -> None:
        """The previous action is known only if the first actions of each chunk are taken, and then the next chunk."""
        if self.chunk is None:
            return
        reason = None
        if self.chunk.ensemble is not None:
            reason = "the mean of several chunks is taken"
        elif {PREV_CHUNK, INFERENCE_DELAY} & {spec.name for spec in self.signature.observations}:
            reason = "a new chunk begins at an action that depends on the delay"
        if reason is not None:
            raise UsageError(
                f"limits: {self.output.name}: change and hold need the action that was taken last, which the program "
                f"cannot know: {reason}; give bounds and a constant fallback"
            )

    def _bound(self, key: str) -> Array | None:
        """The values of `low`, `high` or `change` in the output's dtype, (*shape), never wider than they were given."""
        given = getattr(self.section, key)
        if given is None:
            return None
        values = self._shaped(key, given)
        dtype = self.spec.numpy_dtype
        if dtype.kind != "f":
            return self._whole(key, values)
        with np.errstate(over="ignore"):
            near = values.astype(dtype)
        if not np.isfinite(near).all():
            raise self._wrong(key, f"numbers of {self.spec.dtype}", values)
        inward = dtype.type(np.inf if key == "low" else -np.inf)
        wider = near < values if key == "low" else near > values
        return np.where(wider, np.nextafter(near, inward), near).astype(np.float64)

    def _whole(self, key: str, values: Array) -> Array:
        least, most = self.spec.limits
        if (values != np.round(values)).any() or (np.abs(values) > LARGEST).any():
            raise self._wrong(key, f"whole numbers for {self.output}", values)
        if key != "change" and ((values < least) | (values > most)).any():
            raise self._wrong(key, f"{least} to {most}, as {self.spec.dtype} has", values)
        return values

    def _within(self, key: str, low: Array, high: Array) -> Any:
        """`start` or `fallback` as a tuple in the output's dtype, within the bounds; "hold" and None as they are."""
        given = getattr(self.section, key)
        if given is None or isinstance(given, str):
            return given
        values = self._shaped(key, given)
        if self.spec.numpy_dtype.kind != "f":
            values = self._whole(key, values)
        # The bounds were rounded inwards: a value at the bound that was given is at the rounded one.
        near = np.clip(values, low, high)
        with np.errstate(over="ignore"):
            rounded = near.astype(self.spec.numpy_dtype).astype(np.float64)
        gap = 0.0 if self.spec.numpy_dtype.kind != "f" else float(np.finfo(self.spec.numpy_dtype).eps)
        if (np.abs(near - values) > gap * np.abs(values)).any() or not np.isfinite(rounded).all():
            raise self._wrong(key, f"values within the bounds, {_text(low)} to {_text(high)}", values)
        return _row_major(np.clip(rounded, low, high))

    def _among(self, key: str, allowed: Array) -> Any:
        given = getattr(self.section, key)
        if given is None or isinstance(given, str):
            return given
        values = self._shaped(key, given)
        if not np.isin(values, allowed).all():
            raise self._wrong(key, f"an allowed action, one of {_text(allowed)}", values)
        return _row_major(values)

    def _shaped(self, key: str, values: Array) -> Array:
        """`values` for each element of an action: one number for all, or as many as its last axis has, or all."""
        shape = self.spec.shape
        try:
            return np.array(np.broadcast_to(values, shape))
        except ValueError:
            lengths = f"one number or {' × '.join(map(str, shape))}" if shape else "one number"
            got = " × ".join(map(str, values.shape))
            raise UsageError(
                f"limits: {self.output.name}.{key}: expected {lengths}, as an action is {self.spec}; got {got}"
            ) from None

    def _wrong(self, key: str, expected: str, got: Any) -> UsageError:
        return UsageError(f"limits: {self.output.name}.{key}: expected {expected}; got {_text(got)}")


def _free(name: str, taken: set[str]) -> str:
    """`name`, or with underscores if it or the output that replaces it is taken."""
    while name in taken or f"next_{name}" in taken:
        name += "_"
    taken |= {name, f"next_{name}"}
    return name


def _row_major(values: Array | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values.reshape(-1))


def _text(values: Any) -> str:
    """Numbers for people: one if all are the same."""
    flat: Sequence[Any] = np.asarray(values).reshape(-1).tolist()
    unique = list(dict.fromkeys(f"{value:g}" for value in flat))
    return unique[0] if len(unique) == 1 else f"[{', '.join(f'{value:g}' for value in flat)}]"
