"""Golden samples: inputs with the trained policy's outputs, stored in the artifact; and how programs are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from actserve.core import bfloat16
from actserve.core.errors import CorruptFile, RuntimeFailure
from actserve.core.limits import LIMITED
from actserve.core.signature import Array, Arrays, Signature, TensorSpec
from actserve.engine.runtimes import load as runtimes
from actserve.engine.runtimes.base import Runtime
from actserve.store.artifact import GOLDEN, Artifact

EPSILONS = {"float16": 2.0**-10, "bfloat16": bfloat16.EPSILON}
ROUNDINGS = 2
MARGINAL = 50  # one in so many items may be at a limit, where rounding decides whether `limited` says so
INPUT = "input."
OUTPUT = "output."


@dataclass(frozen=True)
class Tolerance:
    """The allowed difference of floating-point outputs from the reference. Integer outputs must be equal."""

    absolute: float = 1e-4
    relative: float = 1e-4

    def of(self, spec: TensorSpec) -> Tolerance:
        """The tolerance of one tensor. Numbers of 16 bits may be rounded another way, more than once."""
        rounding = ROUNDINGS * EPSILONS.get(spec.dtype, 0.0)
        return Tolerance(max(self.absolute, rounding), max(self.relative, rounding))


@dataclass(frozen=True)
class Agreement:
    """The result of comparing a program with the reference."""

    compared: int  # number of items
    differing: tuple[int, ...]  # items with another action than the reference
    largest_difference: dict[str, float]  # absolute, by floating-point output
    exceeding: tuple[str, ...]  # outputs beyond the tolerance

    @property
    def holds(self) -> bool:
        return not self.differing and not self.exceeding

    def summary(self) -> dict[str, Any]:
        """JSON-able; the first few differing items only."""
        return asdict(self) | {"differing": list(self.differing[:10]), "exceeding": list(self.exceeding)}


def compare(
    signature: Signature, outputs: Mapping[str, Array], reference: Mapping[str, Array], tolerance: Tolerance
) -> Agreement:
    """Compare a program's outputs, each (B, *shape), with the reference's."""
    largest: dict[str, float] = {}
    exceeding: list[str] = []
    for spec in signature.results:
        ours, theirs = outputs[spec.name], reference[spec.name]
        if spec.numpy_dtype.kind == "f":
            ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
            with np.errstate(invalid="ignore"):  # infinity less infinity
                difference = np.where(ours == theirs, 0.0, np.abs(ours - theirs))
            largest[spec.name] = float(np.max(difference, initial=0.0))
            allowed = tolerance.of(spec)
            if not np.allclose(ours, theirs, rtol=allowed.relative, atol=allowed.absolute):
                exceeding.append(spec.name)
        elif spec.name == LIMITED and signature.limits is not None:
            if int((ours != theirs).sum()) > max(1, len(ours) // MARGINAL):
                exceeding.append(spec.name)
        elif spec is not signature.action and not np.array_equal(ours, theirs):
            exceeding.append(spec.name)
    action = signature.action
    differing: tuple[int, ...] = ()
    if action.numpy_dtype.kind != "f":  # a continuous action was compared above, like every output
        same = agreeing(outputs[action.name], reference[action.name], tolerance)
        differing = tuple(map(int, np.flatnonzero(~same)))
    return Agreement(len(reference[action.name]), differing, largest, tuple(exceeding))


def agreeing(ours: Array, theirs: Array, tolerance: Tolerance) -> Array:
    """Whether each item's actions agree, (B,) bool: discrete ones are equal, continuous ones within the tolerance.

    `ours` and `theirs` are (B, *shape).
    """
    if ours.dtype.kind == "f":
        same = np.isclose(ours, theirs, rtol=tolerance.relative, atol=tolerance.absolute)
    else:
        same = ours == theirs
    return np.asarray(same.reshape(len(ours), -1).all(axis=1))


def in_batches(run: Callable[[Arrays], Arrays], inputs: Mapping[str, Array], size: int) -> Arrays:
    """Run all items of `inputs` in batches of `size` (the last may be smaller), and concatenate the outputs."""
    count = len(next(iter(inputs.values())))
    parts = [run({k: v[start : start + size] for k, v in inputs.items()}) for start in range(0, count, size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def save(inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> bytes:
    """The bytes of golden.safetensors."""
    tensors = {INPUT + k: np.ascontiguousarray(v) for k, v in inputs.items()}
    return save_tensors(tensors | {OUTPUT + k: np.ascontiguousarray(v) for k, v in outputs.items()})


def read(artifact: Artifact) -> tuple[Arrays, Arrays]:
    """(inputs, reference outputs) of an artifact's golden samples, with their hash verified. Raises a `StoreError`."""
    try:
        tensors = load_tensors(artifact.read(GOLDEN))
    except SafetensorError as error:
        raise CorruptFile(f"{artifact.label}: {GOLDEN} cannot be read: {error}", file=GOLDEN) from None
    inputs = {k.removeprefix(INPUT): v for k, v in tensors.items() if k.startswith(INPUT)}
    return inputs, {k.removeprefix(OUTPUT): v for k, v in tensors.items() if k.startswith(OUTPUT)}


def check(artifact: Artifact, run: Callable[[Arrays], Arrays]) -> Agreement:
    """Run the golden samples one by one and in batches. Returns the first comparison that fails, else the last."""
    inputs, reference = read(artifact)
    tolerance = Tolerance(**artifact.manifest.certificate["tolerance"])
    signature = artifact.manifest.signature
    for size in sorted({1, min(8, signature.max_batch)}):
        agreement = compare(signature, in_batches(run, inputs, size), reference, tolerance)
        if not agreement.holds:
            break
    return agreement


def load(name: str, artifact: Artifact, threads: int, shared: Path | None = None) -> Runtime:
    """Load a program and check it with the golden samples. Arguments and errors as of `Runtime.load`."""
    runtime = runtimes.load(name, artifact, threads, shared)
    try:
        prove(runtime, name, artifact)
    except BaseException:
        runtime.close()
        raise
    return runtime


def prove(runtime: Runtime, name: str, artifact: Artifact) -> None:
    """Check a loaded program with the golden samples. Raises `StoreError` or `RuntimeFailure`."""
    agreement = check(artifact, runtime.run)
    if not agreement.holds:
        raise RuntimeFailure(
            f"{artifact.label}: the .{name} program does not repeat the golden samples on this host: "
            f"{len(agreement.differing)} of {agreement.compared} actions differ; "
            f"beyond tolerance: {', '.join(agreement.exceeding) or 'none'}"
        )
    runtime.prove(artifact.manifest.name, read(artifact)[0])
