"""The certificate: the programs give the policy's results. The golden samples let every host check them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from actserve.core.completion import draw_noise
from actserve.core.errors import Disagreement
from actserve.core.signature import EXPLORE, IS_INIT, Array, Arrays, Signature
from actserve.engine import golden
from actserve.engine.golden import Agreement, Tolerance
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.load import load
from actserve.store.artifact import Artifact
from actserve_export.certify import distributions as statistics
from actserve_export.sources import samples
from actserve_export.sources.interfaces import CapturedPolicy, ExportSource, OriginalPolicy

BATCH_SIZES = (1, 3, 8, 32)
SAMPLES = 512
GOLDEN_SAMPLES = 32
ROLLOUT_STEPS = 200
ROLLOUT_ROWS = 8
TOLERANCE = Tolerance()
_SCORES = ("action_value", "logits")  # outputs whose two largest entries decide the action


@dataclass(frozen=True)
class Evidence:
    certificate: dict[str, Any]  # JSON-able; goes into the manifest
    golden: bytes  # golden.safetensors


def certify(
    captured: CapturedPolicy, source: ExportSource, draft: Artifact, progress: Callable[[str], None]
) -> Evidence:
    """Compare every program of `draft` with the eager policy: single steps at several batch sizes, and rollouts.

    Raises `Disagreement`, which names the program, the batch size or step, and the items.
    """
    signature = captured.signature
    progress(f"collecting {SAMPLES} samples")
    inputs = samples.collect(source, signature, SAMPLES)
    sizes = [size for size in BATCH_SIZES if size <= signature.max_batch]
    reference = golden.in_batches(captured.run_reference, inputs, 1)  # each item alone
    rollout = _Rollout.of(captured, inputs) if signature.state else None
    certificate: dict[str, Any] = {
        "samples": SAMPLES,
        "samples_from": source.samples_from,
        "reference": source.reference,
        "batch_sizes": sizes,
        "tolerance": asdict(TOLERANCE),
        "smallest_margin": smallest_score_margin(signature, reference),
        "actions": count_actions(signature, reference),
        "programs": {},
        "not_shown": _not_shown(captured, source),
    }
    if source.original is not None:
        progress(f"comparing with {source.original.name}")
        certificate["original"] = _compare_original(captured, source.original, inputs)
    for name in draft.manifest.programs:
        progress(f"certifying .{name} on {SAMPLES} samples at batch {', '.join(map(str, sizes))}")
        runtime = load(name, draft)
        try:
            found = _certify_program(name, runtime, inputs, reference, sizes)
            if rollout is not None:
                progress(f"certifying .{name} over {ROLLOUT_STEPS} steps with resets")
                found["rollout"] = rollout.certify(name, runtime)
        finally:
            runtime.close()
        certificate["programs"][name] = found
    if signature.noise:
        progress("comparing random actions with the policy's own")
        certificate["statistics"] = statistics.compare(captured, source, inputs)
    chosen = np.linspace(0, SAMPLES - 1, GOLDEN_SAMPLES).astype(int)
    picked = [{k: v[chosen] for k, v in part.items()} for part in (inputs, reference)]
    return Evidence(certificate, golden.save(*picked))


def _not_shown(captured: CapturedPolicy, source: ExportSource) -> list[str]:
    """What the certificate does not show, as sentences."""
    gaps = []
    if source.samples_from == "random and boundary values":
        gaps.append("real observations: the samples are random, because the source gives none")
    if captured.single_item_reason is not None:
        gaps.append(f"batches: the programs take one item a call, because {captured.single_item_reason}")
    if captured.signature.noise and captured.signature.exploration == ("random",):
        gaps.append("a deterministic mode: the policy draws whenever it acts")
    if reason := getattr(captured, "left_out", ""):
        gaps.append(f"outputs that are left out: {reason}")
    return gaps


def _compare_original(captured: CapturedPolicy, original: OriginalPolicy, inputs: Arrays) -> dict[str, Any]:
    """Compare the captured policy with its training library, item by item."""
    signature = captured.signature
    if EXPLORE.name in inputs:
        inputs = inputs | {EXPLORE.name: np.zeros(SAMPLES, bool)}
    ours = golden.in_batches(captured.run_reference, inputs, 1)
    theirs = golden.in_batches(original.act, inputs, 1)
    agreement = golden.compare(signature, ours, ours | theirs, TOLERANCE)
    if not agreement.holds:
        raise _disagreement("what was captured", signature, agreement, ours, ours | theirs)
    found = _summary([agreement])
    largest = {name: value for name, value in found["largest_difference"].items() if name in theirs}
    return {"name": original.name, **found, "largest_difference": largest}


def _certify_program(
    name: str, runtime: Runtime, inputs: Arrays, reference: Arrays, sizes: Sequence[int]
) -> dict[str, Any]:
    """Run every item alone, and in batches of each size in random company: every result is the item's own."""
    found: list[Agreement] = []
    rng = np.random.default_rng(2)
    for size in sizes:
        order = np.arange(SAMPLES) if size == 1 else rng.permutation(SAMPLES)
        outputs = golden.in_batches(runtime.run, {name: array[order] for name, array in inputs.items()}, size)
        expected = {name: array[order] for name, array in reference.items()}
        found.append(golden.compare(runtime.signature, outputs, expected, TOLERANCE))
        if not found[-1].holds:
            raise _disagreement(f".{name} at batch {size}", runtime.signature, found[-1], outputs, expected)
    return _summary(found)


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


@dataclass(frozen=True)
class _Rollout:
    """`ROLLOUT_STEPS` steps in several rows at once, with resets in some. State is fed back."""

    steps: list[Arrays]  # the inputs of each step without the state
    reference: list[Arrays]  # the policy's results, with its own state fed back

    @classmethod
    def of(cls, captured: CapturedPolicy, inputs: Arrays) -> _Rollout:
        signature = captured.signature
        rows = min(ROLLOUT_ROWS, signature.max_batch)
        states = {state.spec.name for state in signature.state}
        steps = []
        for step in range(ROLLOUT_STEPS):
            at = (np.arange(rows) * (SAMPLES // rows) + step) % SAMPLES
            taken = {name: array[at] for name, array in inputs.items() if name not in states}
            if signature.is_init:
                taken[IS_INIT.name] = taken[IS_INIT.name] | (step == 0)
            steps.append(taken | draw_noise(signature.noise, step, rows))
        return cls(steps, _run_steps(captured.run_reference, signature, steps))

    def certify(self, name: str, runtime: Runtime) -> dict[str, Any]:
        found = []
        results = _run_steps(runtime.run, runtime.signature, self.steps)
        for step, (ours, theirs) in enumerate(zip(results, self.reference, strict=True)):
            found.append(golden.compare(runtime.signature, ours, theirs, TOLERANCE))
            if not found[-1].holds:
                raise _disagreement(f".{name} at step {step} of a rollout", runtime.signature, found[-1], ours, theirs)
        return {"steps": len(self.steps), **_summary(found)}


def _run_steps(run: Callable[[Arrays], Arrays], signature: Signature, steps: list[Arrays]) -> list[Arrays]:
    rows = len(next(iter(steps[0].values())))
    state = {s.spec.name: s.initial_value(rows) for s in signature.state}
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
    lines = [f"{what} is not the policy: nothing was published."]
    for item in agreement.differing[:5]:
        ours, theirs = outputs[action][item].tolist(), reference[action][item].tolist()
        lines.append(f"  item {item}: the policy's {action} is {theirs}, the program gives {ours}")
    if len(agreement.differing) > 5:
        lines.append(f"  and {len(agreement.differing) - 5} more of {agreement.compared}")
    for output in agreement.exceeding:
        difference = agreement.largest_difference.get(output, 1.0)
        lines.append(f"  {output}: largest difference {difference:.3g}, allowed {asdict(TOLERANCE)}")
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
    for name in _SCORES:
        if name in signature.output_names:
            ordered: Array = np.sort(outputs[name], axis=-1)
            return float(np.min(ordered[..., -1] - ordered[..., -2]))
    return None
