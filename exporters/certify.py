"""The proof that the programs do what the policy does, and the golden samples that let anyone repeat it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from app import golden
from app.artifact import Artifact
from app.errors import Disagreement
from app.golden import Agreement, Tolerance
from app.runtimes import base as runtimes
from app.signature import Array, Arrays, Signature
from exporters.capture import Captured

BATCH_SIZES = (1, 3, 8, 32)
SAMPLES = 512
GOLDEN_SAMPLES = 32
TOLERANCE = Tolerance()
_SCORES = ("action_value", "logits")  # outputs whose two largest entries decide the action


@dataclass(frozen=True)
class Evidence:
    certificate: dict[str, Any]  # JSON-able; goes into the manifest
    golden: bytes  # golden.safetensors


def certify(
    captured: Captured, inputs: Arrays, real: bool, draft: Artifact, progress: Callable[[str], None]
) -> Evidence:
    """Hold every program of `draft` against the eager policy, on all of `inputs`, at each batch size.

    `inputs`: by name, each (N, *shape); `real` says whether they came from the environment. Raises `Disagreement`,
    which says which program, at which batch size, on which items.
    """
    sizes = [size for size in BATCH_SIZES if size <= captured.signature.max_batch]
    references = {size: golden.in_batches(captured.run_reference, inputs, size) for size in sizes}
    programs: dict[str, Any] = {}
    for name in draft.manifest.programs:
        progress(f"certifying .{name} on {SAMPLES} samples at batch {', '.join(map(str, sizes))}")
        programs[name] = _certify_program(name, draft, inputs, references)
    chosen = np.linspace(0, len(next(iter(inputs.values()))) - 1, GOLDEN_SAMPLES).astype(int)
    reference = references[sizes[0]]
    certificate = {
        "samples": len(reference[captured.signature.action.name]),
        "samples_from": "environment" if real else "random",
        "reference": "the TorchRL policy, eager, float32, CPU",
        "batch_sizes": sizes,
        "tolerance": asdict(TOLERANCE),
        "smallest_margin": smallest_margin(captured.signature, reference),
        "programs": programs,
    }
    picked = {k: v[chosen] for k, v in inputs.items()}, {k: v[chosen] for k, v in reference.items()}
    return Evidence(certificate, golden.save(*picked))


def _certify_program(name: str, draft: Artifact, inputs: Arrays, references: dict[int, Arrays]) -> dict[str, Any]:
    runtime = runtimes.load(name, draft)
    try:
        found = {}
        for size, reference in references.items():
            outputs = golden.in_batches(runtime.run, inputs, size)
            agreement = golden.compare(runtime.signature, outputs, reference, TOLERANCE)
            if not agreement.holds:
                raise _disagreement(name, size, runtime.signature, agreement, outputs, reference)
            found[size] = agreement
    finally:
        runtime.close()
    names = next(iter(found.values())).largest_difference
    return {
        "compared": sum(agreement.compared for agreement in found.values()),
        "action_disagreements": 0,
        "largest_difference": {n: max(agreement.largest_difference[n] for agreement in found.values()) for n in names},
    }


def _disagreement(
    name: str, size: int, signature: Signature, agreement: Agreement, outputs: Arrays, reference: Arrays
) -> Disagreement:
    action = signature.action.name
    lines = [f".{name} at batch {size} is not the policy: nothing was published."]
    for item in agreement.differing[:5]:
        ours, theirs = outputs[action][item].tolist(), reference[action][item].tolist()
        lines.append(f"  item {item}: the policy's {action} is {theirs}, .{name} gives {ours}")
    if len(agreement.differing) > 5:
        lines.append(f"  and {len(agreement.differing) - 5} more of {agreement.compared}")
    for output in agreement.exceeding:
        difference = agreement.largest_difference.get(output, 1.0)
        lines.append(f"  {output}: largest difference {difference:.3g}, allowed {asdict(TOLERANCE)}")
    return Disagreement("\n".join(lines), runtime=name, batch_size=size, **agreement.summary())


def smallest_margin(signature: Signature, outputs: Arrays) -> float | None:
    """The smallest lead of a chosen action over the next best: what noise must stay below. None: no scores."""
    for name in _SCORES:
        if name in signature.output_names:
            ordered: Array = np.sort(outputs[name], axis=-1)
            return float(np.min(ordered[..., -1] - ordered[..., -2]))
    return None
