"""The certificate's part on limits: fuzzes each program. An action or state outside of the limits is an error.

The inputs are steps of episodes. Their numbers are random bits, special values (NaN, infinities, denormals, the largest
ones, those at the bounds), samples, samples scaled by up to 1e38, and samples with one special value in them. State is
the program's own, and in every fifth item fuzzed like the rest. NumPy computes the limits here, independently of the
nodes in the programs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actserve.core.errors import CaptureFailed, Disagreement, RefusedByProgram, RuntimeFailure
from actserve.core.limits import LIMITED, OutputLimits, Reason
from actserve.core.signature import IS_INIT, Array, Arrays, Signature, TensorSpec
from actserve.engine.runtimes.base import Runtime
from actserve_export.programs.cost import Run, cpu_seconds
from actserve_export.sources import samples
from actserve_export.sources.interfaces import ExportSource
from actserve_export.sources.limited_actions import action_spec, starting_action, taken_of_chunk

if TYPE_CHECKING:
    from actserve_export.capture.limits.policy import LimitedPolicy

INPUTS = 100_000  # for each program, if they fit into the budget
FEWEST = 2_000
BUDGET_S = 10.0  # of one core, for each program
ROWS = 256  # episodes side by side
STEPS = 50  # of an episode
POOL = 256  # samples that inputs are made from
FUZZED_STATE = 0.2  # the share of items whose state is not the program's own


@dataclass
class Findings:
    """Counts of fuzzed inputs. `reasons`: how many were limited, by reason."""

    inputs: int = 0
    limited: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    refused: int = 0  # the program fails on them: they have no action
    outside_without: int = 0  # what the policy's own action would have been
    untouched: int = 0  # compared bit for bit with the policy's own

    def as_json(self) -> dict[str, Any]:
        """JSON-able. None is outside: such an input is an error."""
        found = {"inputs": self.inputs, "limited": self.limited, "reasons": dict(self.reasons), "outside": 0}
        return found | ({"refused": self.refused} if self.refused else {})


def certify_limits(
    captured: LimitedPolicy,
    source: ExportSource,
    runtimes: Mapping[str, Runtime],
    inputs: int | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Fuzz the policy and its programs, `inputs` for each; None: as many as fit into a budget of time. JSON-able.

    Raises `Disagreement` if a program leaves the limits, or if an item that is not limited differs from the policy's
    own in any bit.
    """
    own, signature = captured.unlimited, captured.signature
    pool = samples.collect(source, signature, POOL)
    progress("fuzzing the limits of the policy")
    reference = fuzz("the policy", captured.run_reference, signature, pool, inputs, own=own.run_reference)
    programs = {}
    for name, runtime in runtimes.items():
        progress(f"fuzzing the limits of .{name}")
        programs[name] = fuzz(f".{name}", runtime.run_unchecked, signature, pool, inputs).as_json()
    return {
        "inputs": reference.inputs,
        "outside_without_limits": reference.outside_without,
        "equal_where_not_limited": reference.untouched,
        "programs": programs,
    }


def fuzz(
    name: str,
    run: Run,
    signature: Signature,
    pool: Arrays,
    inputs: int | None = None,
    *,
    own: Run | None = None,
    seed: int = 0,
    progress: Callable[[Findings], None] = lambda findings: None,
) -> Findings:
    """Run `inputs` fuzzed items and check each result. `pool` has samples of every input, each (n, *shape).

    `inputs` None: as many as fit into a budget of time. `own` runs the policy without limits, to compare with.
    Raises `Disagreement`, which begins with `name`.
    """
    findings = Findings()
    with np.errstate(all="ignore"):
        made = FuzzedInputs(signature, pool, min(ROWS, signature.max_batch), seed)
        count = _affordable(run, made) if inputs is None else inputs
        results: Arrays | None = None
        for step in range(-(-count // made.rows)):
            given = made.step(None if step % STEPS == 0 else results)
            results = _answer(run, given)
            findings.inputs += made.rows
            if results is None:
                findings.refused += made.rows
                continue
            _check(name, signature, given, results, findings)
            if own is not None:
                _compare_with_own(name, signature, given, results, own(given), findings)
            progress(findings)
    if findings.refused == findings.inputs:
        raise Disagreement(f"{name}: the limits are not shown: it fails on all {findings.inputs:,} fuzzed inputs")
    return findings


def _affordable(run: Run, made: FuzzedInputs) -> int:
    """How many items fit into the budget."""
    item_s = cpu_seconds(lambda given: _answer(run, given) or {}, made.step(None)) / made.rows
    return int(max(FEWEST, min(BUDGET_S / item_s, INPUTS)))


def _answer(run: Run, given: Arrays) -> Arrays | None:
    """The results; None if the program fails, as one does whose index is out of range."""
    try:
        return run(given)
    except (RuntimeFailure, RefusedByProgram, CaptureFailed):
        return None


def _check(name: str, signature: Signature, given: Arrays, results: Arrays, findings: Findings) -> None:
    """Count the items that are limited. Raises `Disagreement` for one that is outside."""
    limited = results[LIMITED]
    if limited.any():
        findings.limited += int(np.count_nonzero(limited))
        for reason in Reason:
            if count := int(np.count_nonzero(limited & reason)):
                findings.reasons[reason.label] += count
    outside = violations(signature, given, results)
    if outside.any():
        item = int(np.flatnonzero(outside)[0])
        shown = {key: array[item].tolist() for key, array in (given | results).items() if array[item].size <= 64}
        raise Disagreement(
            f"{name} leaves its limits for {int(outside.sum())} of {len(outside)} inputs: nothing was published. "
            f"The first: {shown}"
        )


def _compare_with_own(
    name: str, signature: Signature, given: Arrays, results: Arrays, own: Arrays, findings: Findings
) -> None:
    """Compare the items that are not limited with the policy's own results, bit for bit."""
    assert signature.limits is not None
    leaving = [_breaks(signature, limit, given, own[limit.output]) for limit in signature.limits.outputs]
    findings.outside_without += int(np.logical_or.reduce(leaving).sum())
    same = np.logical_and.reduce([_equal_bits(results[key], array) for key, array in own.items()])
    untouched = results[LIMITED] == 0
    if (untouched & ~same).any():
        item = int(np.flatnonzero(untouched & ~same)[0])
        ours, theirs = ({key: found[key][item].tolist() for key in own} for found in (results, own))
        raise Disagreement(f"{name} changes an item that is not limited: it gives {ours}, and the policy {theirs}")
    findings.untouched += int(untouched.sum())


def _equal_bits(ours: Array, theirs: Array) -> Array:
    """(B,) bool."""
    rows = [np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8) for array in (ours, theirs)]
    equal: Array = (rows[0] == rows[1]).all(1)
    return equal


def violations(signature: Signature, given: Arrays, results: Arrays) -> Array:
    """Which items are out of the limits, (B,) bool: their action, or the state that they leave for the next step."""
    assert signature.limits is not None
    found = [~_finite(results[state.output]) for state in signature.state if state.spec.numpy_dtype.kind == "f"]
    for limit in signature.limits.outputs:
        action = results[limit.output]
        found.append(_breaks(signature, limit, given, action))
        if limit.previous is not None:
            steps = taken_of_chunk(signature, limit.output)
            last = action if steps is None else action[:, steps - 1]
            found.append(~_equal_bits(results[f"next_{limit.previous}"], last))
        if limit.age is not None:
            age = results[f"next_{limit.age}"]
            found.append(~_all((age >= 1) & (age <= limit.dwell)))
    broken: Array = np.logical_or.reduce(found)
    return broken


def _breaks(signature: Signature, limit: OutputLimits, given: Arrays, action: Array) -> Array:
    """Which actions, (B, *shape), are out of the limits of their output, (B,) bool."""
    spec = action_spec(signature, limit.output)
    previous, fresh = _previous(limit, spec, given)
    allowed = _all(_valid(limit, spec, action))
    if limit.change is not None and previous is not None:
        change = np.reshape(limit.change, spec.shape).astype(_exact(spec))
        entries = [action] if taken_of_chunk(signature, limit.output) is None else list(np.moveaxis(action, 1, 0))
        for entry in entries:
            near = (entry >= previous - change) & (entry <= previous + change)
            allowed &= _all(near if limit.start is not None else near | fresh)
            previous, fresh = entry.astype(_exact(spec)), np.zeros_like(fresh)
    if limit.age is not None and previous is not None:
        age = np.where(fresh, 0, given[limit.age])
        stays = (age > 0) & (age < limit.dwell)
        allowed &= _all(~stays | (action == previous))
    broken: Array = ~allowed
    return broken


def _previous(limit: OutputLimits, spec: TensorSpec, given: Arrays) -> tuple[Array | None, Array]:
    """(the previous action, where there is none), both (B, *shape)."""
    starts = given.get(IS_INIT.name)
    if limit.previous is None or starts is None:
        return None, np.zeros(0, bool)
    previous = given[limit.previous]
    fresh = starts.reshape(-1, *[1] * len(spec.shape)) | ~_valid(limit, spec, previous)
    start = np.reshape(starting_action(limit, spec), spec.shape)
    before = np.where(fresh, start.astype(previous.dtype), previous)
    return before.astype(_exact(spec)), fresh


def _valid(limit: OutputLimits, spec: TensorSpec, action: Array) -> Array:
    """Whether each element is finite and within bounds, or in the allowed set; of the shape of `action`, bool."""
    if limit.allowed is not None:
        return np.isin(action, limit.allowed)
    low, high = (np.reshape(bound, spec.shape) if bound is not None else None for bound in (limit.low, limit.high))
    found: Array = np.isfinite(action)
    if low is not None:
        found &= action >= low
    if high is not None:
        found &= action <= high
    return found


def _exact(spec: TensorSpec) -> np.dtype[Any]:
    """The dtype that the programs compute in."""
    return spec.numpy_dtype if spec.numpy_dtype.kind == "f" else np.dtype(np.int64)


def _finite(array: Array) -> Array:
    return _all(np.asarray(np.isfinite(array)))


def _all(flags: Array) -> Array:
    """(B, ...) bool -> (B,)."""
    every: Array = np.asarray(flags.reshape(len(flags), -1).all(1))
    return every


class FuzzedInputs:
    """Makes steps of `rows` episodes from `pool`; the same ones for the same seed and results."""

    def __init__(self, signature: Signature, pool: Arrays, rows: int, seed: int) -> None:
        self.rows = rows
        self._pool = pool
        self._signature = signature
        self._rng = np.random.default_rng(seed)
        self._special = {spec.name: _special_values(spec, signature) for spec in signature.inputs if _is_float(spec)}
        self._limit_state = {name for limit in _outputs(signature) for name in (limit.previous, limit.age) if name}

    def step(self, results: Arrays | None) -> Arrays:
        """Every input, each (rows, *shape). `results` are those of the step before; None: an episode begins."""
        given = {spec.name: self._fuzzed(spec) for spec in self._signature.inputs}
        if results is not None:
            for state in self._signature.state:
                own = self._rng.random(self.rows) >= FUZZED_STATE
                given[state.spec.name][own] = results[state.output][own]
        return given

    def _fuzzed(self, spec: TensorSpec) -> Array:
        rng, shape = self._rng, (self.rows, *spec.shape)
        values = self._pool[spec.name][rng.integers(0, len(self._pool[spec.name]), self.rows)]
        if _is_float(spec):
            self._fuzz_floats(spec, values)
        elif spec.numpy_dtype.kind in "iu" and (spec.numpy_dtype.itemsize == 1 or spec.name in self._limit_state):
            wild = rng.random(self.rows) < 0.5
            bits = rng.integers(0, 256, (*shape, spec.numpy_dtype.itemsize), np.uint8)
            values[wild] = bits.view(spec.numpy_dtype).reshape(shape)[wild]
        elif spec.name == IS_INIT.name:
            values = rng.random(self.rows) < 1 / STEPS
        return values

    def _fuzz_floats(self, spec: TensorSpec, values: Array) -> None:
        """Change some rows of `values`, samples, in place."""
        rng, flat = self._rng, values.reshape(self.rows, spec.elements)
        if not spec.elements:
            return
        kinds = rng.integers(0, 6, self.rows)  # 0 and 1: samples as they are
        special = self._special[spec.name]
        width = spec.numpy_dtype.itemsize
        bits = rng.integers(0, 256, (self.rows, spec.elements, width), np.uint8).view(spec.numpy_dtype)[..., 0]
        scale = 10.0 ** rng.uniform(-3, 38, (self.rows, 1))
        scaled = (flat * scale).astype(spec.numpy_dtype)
        drawn = special[rng.integers(0, len(special), flat.shape)]
        at = np.arange(spec.elements) == rng.integers(0, spec.elements, (self.rows, 1))
        for kind, made in ((2, bits), (3, scaled), (4, drawn)):
            flat[kinds == kind] = made[kinds == kind]
        flat[:] = np.where(at & (kinds == 5)[:, None], drawn, flat)


def _special_values(spec: TensorSpec, signature: Signature) -> Array:
    """The numbers at which arithmetic changes, and those around the limits."""
    limits = np.finfo(spec.numpy_dtype)
    values = [0.0, 1.0, limits.eps, limits.tiny, limits.smallest_subnormal, limits.max, 1e4]
    for limit in _outputs(signature):
        values += [abs(value) for bound in (limit.low, limit.high, limit.change) for value in bound or ()]
    near = np.array(values).astype(spec.numpy_dtype)
    near = np.concatenate([near, np.nextafter(near, spec.numpy_dtype.type(np.inf)), near - near * limits.eps])
    endless = np.tile(np.array([np.nan, np.inf, -np.inf], spec.numpy_dtype), len(near) // 4)  # one in four
    return np.concatenate([near, -near, endless])


def _outputs(signature: Signature) -> tuple[OutputLimits, ...]:
    return () if signature.limits is None else signature.limits.outputs


def _is_float(spec: TensorSpec) -> bool:
    return spec.numpy_dtype.kind == "f"
