"""The certificate: the programs give the policy's results. The golden samples let every host check them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from actserve.core.completion import draw_noise
from actserve.core.errors import CaptureFailed, Disagreement
from actserve.core.signature import EXPLORE, IS_INIT, Array, Arrays, Signature
from actserve.engine import golden
from actserve.engine.golden import Agreement, Tolerance
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.load import load
from actserve.store.artifact import Artifact
from actserve_export.capture.limits.policy import LimitedPolicy, without_limits
from actserve_export.certify import distributions as statistics
from actserve_export.certify.as_given import as_given
from actserve_export.certify.effort import BATCH_SIZES, LEAST_SAMPLES, Effort, about
from actserve_export.certify.limits import certify_limits
from actserve_export.sources import samples
from actserve_export.sources.interfaces import CapturedPolicy, ExportSource, OriginalPolicy

GOLDEN_SAMPLES = 32  # at most, and one of four samples: a service runs them whenever it loads the policy
TOLERANCE = Tolerance()
FOLLOWED = 20  # steps of a rollout, at least, before differences of rounding may have added up
Reference = TypeVar("Reference")
Result = TypeVar("Result")
_SCORES = ("action_value", "logits")  # outputs whose two largest entries decide the action


@dataclass(frozen=True)
class Evidence:
    certificate: dict[str, Any]  # JSON-able; goes into the manifest
    golden: bytes  # golden.safetensors


def certify(
    captured: CapturedPolicy,
    source: ExportSource,
    draft: Artifact,
    progress: Callable[[str], None],
    fuzzed: int | None = None,
) -> Evidence:
    """Compare every program of `draft` with the eager policy: single steps at several batch sizes, and rollouts.

    A slow policy gets fewer samples, compared in the same ways. `fuzzed` inputs check the limits of each program; None:
    as many as fit into a budget of time. Raises `Disagreement`, which names the program, the batch size or step, and
    the items.
    """
    signature = captured.signature
    sizes = [size for size in BATCH_SIZES if size <= signature.max_batch]
    with ExitStack() as opened:
        runtimes = {name: load(name, draft) for name in draft.manifest.programs}
        for runtime in runtimes.values():
            opened.callback(runtime.close)
        inputs = samples.collect(source, signature, LEAST_SAMPLES)
        effort = Effort.of(captured.run_reference, [runtime.run for runtime in runtimes.values()], signature, inputs)
        if effort.samples > LEAST_SAMPLES:
            inputs = samples.collect(source, signature, effort.samples)
        listed = " and ".join(f".{name}" for name in runtimes)
        progress(
            f"comparing {listed} with the policy on {effort.samples} samples at batch {', '.join(map(str, sizes))}"
            + about(effort.samples_s)
        )
        reference, found = _compare_samples(captured, runtimes, inputs, sizes, effort.slow)
        certificate: dict[str, Any] = {
            "samples": effort.samples,
            "samples_from": source.samples_from,
            "reference": source.reference,
            "batch_sizes": sizes,
            "tolerance": asdict(TOLERANCE),
            **_wider_tolerances(signature),
            "smallest_margin": smallest_score_margin(signature, reference),
            "actions": count_actions(signature, reference),
            "programs": found,
            "not_shown": _not_shown(captured, source),
        }
        own = without_limits(captured)
        if (original := source.original or as_given(own, source)) is not None:
            progress(f"comparing with {original.name}")
            certificate["original"] = _compare_original(own, original, inputs, reference if own is captured else None)
        if signature.state:
            progress(
                f"comparing {listed} over {effort.steps} steps of {effort.rows} episodes" + about(effort.rollout_s)
            )
            for name, rollout in _compare_rollouts(captured, runtimes, inputs, effort).items():
                found[name]["rollout"] = rollout
        if isinstance(captured, LimitedPolicy):
            certificate["limits"] = certify_limits(captured, source, runtimes, fuzzed, progress)
    if signature.noise:
        progress("comparing random actions with the policy's own")
        certificate["statistics"] = statistics.compare(own, source, inputs, effort.draws)
    chosen = np.linspace(0, effort.samples - 1, min(GOLDEN_SAMPLES, effort.samples // 4)).astype(int)
    picked = [{k: v[chosen] for k, v in part.items()} for part in (inputs, reference)]
    return Evidence(certificate, golden.save(*picked))


def _compare_samples(
    captured: CapturedPolicy, runtimes: Mapping[str, Runtime], inputs: Arrays, sizes: Sequence[int], slow: bool
) -> tuple[Arrays, dict[str, dict[str, Any]]]:
    """(the policy's results for each item alone, the findings by program).

    Each item runs alone, and in batches of each size in random company: every result is the item's own.
    """
    rng = np.random.default_rng(2)
    count = len(next(iter(inputs.values())))
    orders = {size: np.arange(count) if size == 1 else rng.permutation(count) for size in sizes}

    def in_company(runtime: Runtime) -> dict[int, Arrays]:
        return {
            size: golden.in_batches(runtime.run, {name: array[order] for name, array in inputs.items()}, size)
            for size, order in orders.items()
        }

    reference, results = _side_by_side(
        lambda: golden.in_batches(captured.run_reference, inputs, 1), in_company, runtimes, slow
    )
    _refuse_nan(reference)
    found = {}
    for name, by_size in results.items():
        agreements = []
        for size, outputs in by_size.items():
            expected = {key: array[orders[size]] for key, array in reference.items()}
            agreements.append(golden.compare(captured.signature, outputs, expected, TOLERANCE))
            if not agreements[-1].holds:
                where = f".{name} at batch {size}"
                raise _disagreement(where, captured.signature, agreements[-1], outputs, expected)
        found[name] = _summary(agreements)
    return reference, found


def _refuse_nan(reference: Arrays) -> None:
    """Raise `CaptureFailed` if results of the policy itself are not numbers, which cannot be compared."""
    for name, array in reference.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            wrong = sum(bool(np.isnan(item).any()) for item in array)
            raise CaptureFailed(
                f"the policy's own {name} is NaN for {wrong} of {len(array)} samples, which cannot be compared: have "
                "it give numbers for all observations, or give the export real ones (`observe`)"
            )


def _side_by_side(
    of_policy: Callable[[], Reference],
    of_program: Callable[[Runtime], Result],
    runtimes: Mapping[str, Runtime],
    slow: bool,
) -> tuple[Reference, dict[str, Result]]:
    """The work on the policy and on each program. If it is `slow`, ONNX Runtime works on another core meanwhile.

    Short calls would wait longer for Python's interpreter lock than they take. torch stays in this thread, because its
    number of threads is set for each thread.
    """
    with ThreadPoolExecutor(1) as other:
        beside = {name: other.submit(of_program, runtimes[name]) for name in runtimes if slow and name == "onnx"}
        reference = of_policy()
        results = {name: of_program(runtime) for name, runtime in runtimes.items() if name not in beside}
        results |= {name: future.result() for name, future in beside.items()}
    return reference, {name: results[name] for name in runtimes}


def _wider_tolerances(signature: Signature) -> dict[str, Any]:
    """The tolerances of numbers of 16 bits, by dtype, if the policy gives some."""
    given = {spec.dtype: asdict(TOLERANCE.of(spec)) for spec in signature.results if spec.dtype in golden.EPSILONS}
    return {"tolerance_of": given} if given else {}


def _not_shown(captured: CapturedPolicy, source: ExportSource) -> list[str]:
    """The gaps of the certificate, as sentences."""
    gaps = []
    if source.samples_from == "random and boundary values":
        gaps.append("real observations: the samples are random, because the source gives none")
    if captured.single_item_reason is not None:
        gaps.append(f"batches: the programs take one item a call, because {captured.single_item_reason}")
    if captured.signature.noise and captured.signature.exploration == ("random",):
        gaps.append("a deterministic mode: the policy draws whenever it acts")
    if reason := getattr(captured, "deterministic_only", ""):
        gaps.append(f"random actions, which the programs do not have: {reason}")
    if reason := getattr(captured, "left_out", ""):
        gaps.append(f"outputs that are left out: {reason}")
    return gaps


def _compare_original(
    captured: CapturedPolicy, original: OriginalPolicy, inputs: Arrays, reference: Arrays | None
) -> dict[str, Any]:
    """Compare the captured policy in its deterministic mode with the original, item by item.

    `reference`: its results for `inputs`, if they are known.
    """
    signature, ours = captured.signature, reference
    inputs = {spec.name: inputs[spec.name] for spec in signature.inputs}
    if EXPLORE.name in inputs:
        inputs[EXPLORE.name] = np.zeros_like(inputs[EXPLORE.name])
        ours = None
    if ours is None:
        ours = golden.in_batches(captured.run_reference, inputs, 1)
    theirs = golden.in_batches(original.act, inputs, 1)
    agreement = golden.compare(signature, ours, ours | theirs, TOLERANCE)
    if not agreement.holds:
        raise _disagreement("what was captured", signature, agreement, ours, ours | theirs)
    found = _summary([agreement])
    largest = {name: value for name, value in found["largest_difference"].items() if name in theirs}
    return {"name": original.name, **found, "largest_difference": largest}


def _summary(agreements: Any) -> dict[str, Any]:
    agreements = list(agreements)
    return {
        "compared": sum(agreement.compared for agreement in agreements),
        "action_disagreements": sum(len(agreement.differing) for agreement in agreements),
        "largest_difference": {
            name: max(agreement.largest_difference[name] for agreement in agreements)
            for name in agreements[0].largest_difference
        },
    }


def _compare_rollouts(
    captured: CapturedPolicy, runtimes: Mapping[str, Runtime], inputs: Arrays, effort: Effort
) -> dict[str, dict[str, Any]]:
    """Several steps in several rows at once, with resets in some; state is fed back. The findings by program."""
    signature = captured.signature
    states = {state.spec.name for state in signature.state}
    steps = []
    for step in range(effort.steps):
        at = (np.arange(effort.rows) * (effort.samples // effort.rows) + step) % effort.samples
        taken = {name: array[at] for name, array in inputs.items() if name not in states}
        if signature.is_init:
            taken[IS_INIT.name] = taken[IS_INIT.name] | (step == 0)
        steps.append(taken | draw_noise(signature.noise, step, effort.rows))
    reference, results = _side_by_side(
        lambda: _run_steps(captured.run_reference, signature, steps),
        lambda runtime: _run_steps(runtime.run, signature, steps),
        runtimes,
        effort.slow,
    )
    return {
        name: _compare_steps(name, runtimes[name].run, signature, steps, ours, reference)
        for name, ours in results.items()
    }


def _compare_steps(
    name: str,
    run: Callable[[Arrays], Arrays],
    signature: Signature,
    steps: list[Arrays],
    ours: list[Arrays],
    reference: list[Arrays],
) -> dict[str, Any]:
    """The finding on one rollout. Raises `Disagreement`.

    Where state amplifies differences, those of rounding add up over the steps until they are beyond the tolerance. Then
    the program goes on from the reference's state: it must repeat that step, and follow for `FOLLOWED` steps each time.
    """
    agreements: list[Agreement] = []
    begins = 0  # the step at which the program had the reference's state
    shortest = len(steps)
    while len(agreements) < len(steps):
        step = len(agreements)
        mine, theirs = ours[step - begins], reference[step]
        agreement = golden.compare(signature, mine, theirs, TOLERANCE)
        if agreement.holds:
            agreements.append(agreement)
            continue
        if step - begins < FOLLOWED:
            raise _disagreement(f".{name} at step {step} of a rollout", signature, agreement, mine, theirs)
        shortest, begins = min(shortest, step - begins), step
        state = {part.spec.name: reference[step - 1][part.output] for part in signature.state}
        ours = _run_steps(run, signature, steps[step:], state)
    added_up = {"steps_until_rounding_adds_up": shortest} if begins else {}
    return {"steps": len(steps), **added_up, **_summary(agreements)}


def _run_steps(
    run: Callable[[Arrays], Arrays], signature: Signature, steps: list[Arrays], state: Arrays | None = None
) -> list[Arrays]:
    """The results of each step from `state`, by default the initial one."""
    rows = len(next(iter(steps[0].values())))
    state = state or {s.spec.name: s.initial_value(rows) for s in signature.state}
    results = []
    for step in steps:
        given = step | state
        results.append(run({spec.name: given[spec.name] for spec in signature.inputs}))
        state = {s.spec.name: results[-1][s.output] for s in signature.state}
    return results


def _disagreement(
    what: str, signature: Signature, agreement: Agreement, outputs: Mapping[str, Array], reference: Mapping[str, Array]
) -> Disagreement:
    action = signature.action.name
    specs = {spec.name: spec for spec in signature.results}
    lines = [f"{what} is not the policy: nothing was published."]
    for item in agreement.differing[:5]:
        ours, theirs = outputs[action][item].tolist(), reference[action][item].tolist()
        lines.append(f"  item {item}: the policy's {action} is {theirs}, the program gives {ours}")
    if len(agreement.differing) > 5:
        lines.append(f"  and {len(agreement.differing) - 5} more of {agreement.compared}")
    for output in agreement.exceeding:
        difference = agreement.largest_difference.get(output, 1.0)
        lines.append(f"  {output}: largest difference {difference:.3g}, allowed {asdict(TOLERANCE.of(specs[output]))}")
    return Disagreement("\n".join(lines), where=what, **agreement.summary())


def count_actions(signature: Signature, outputs: Mapping[str, Array]) -> dict[str, int] | None:
    """How often the policy chose each action, by its number; None if an action is not a single integer.

    Agreement proves little for a policy that always chooses the same action.
    """
    actions = outputs[signature.action.name]
    if actions.dtype.kind not in "iu" or actions.ndim != 1:
        return None
    return {str(action): int(count) for action, count in zip(*np.unique(actions, return_counts=True), strict=True)}


def smallest_score_margin(signature: Signature, outputs: Mapping[str, Array]) -> float | None:
    """The smallest lead of a chosen action over the next best. A smaller error changes no action. None: no scores."""
    margins = score_margins(signature, outputs)
    return None if margins is None else float(np.min(margins))


def score_margins(signature: Signature, outputs: Mapping[str, Array]) -> Array | None:
    """The lead of the best action over the next best, (N,), of several choices the smallest lead. None: no scores."""
    for name in _SCORES:
        if name in signature.output_names:
            ordered: Array = np.sort(outputs[name], axis=-1)
            leads: Array = ordered[..., -1] - ordered[..., -2]
            smallest: Array = leads.reshape(len(leads), -1).min(axis=1)
            return smallest
    return None
