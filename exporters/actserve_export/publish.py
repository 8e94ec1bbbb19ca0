"""The whole export: capture, build, certify, publish."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from actserve import __version__
from actserve.core.errors import CaptureFailed, UsageError
from actserve.engine.runtimes import preflight
from actserve.store.artifact import FORMAT, GOLDEN, WITHOUT_LIMITS, Artifact, Manifest
from actserve.store.local import ModelStore
from actserve_export.capture import capture
from actserve_export.capture.limits.policy import limit
from actserve_export.certify import certify
from actserve_export.programs.reasons import explained
from actserve_export.sources.interfaces import CapturedPolicy, ExportSource
from actserve_export.sources.limits_file import LimitsFile, parse_limits

RUNTIMES = ("onnx", "pt2")
HOST_BOUND = ("pt2",)  # native code
MISSING = "missing"  # the certificate's entry on programs that could not be built
EVALUATION = "evaluation"  # the certificate's entry on the games that the policy played
GRAPH = "graph.txt"
_TOOLS = ("torch", "torchrl", "tensordict", "onnx", "onnxscript", "onnxruntime", "numpy")


# (an artifact with the programs as they will be published, a progress callback) -> {EVALUATION: JSON-able}
Evaluate = Callable[[Artifact, Callable[[str], None]], dict[str, Any]]


@dataclass(frozen=True)
class Export:
    """The result of an export. `published` is False if the store already held the same export for this host."""

    artifact: Artifact
    published: bool


def export(
    source: ExportSource,
    name: str,
    store: ModelStore | Path | str,
    *,
    origin: str = "a Python program",
    runtimes: Sequence[str] | None = None,
    native: bool = False,
    device: str = "cpu",
    portable: bool = False,
    evaluate: Evaluate | None = None,
    limits: LimitsFile | Mapping[str, Any] | None = None,
    fuzzed: int | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Export:
    """Publish `source` as the next version of `name` in a store or its folder, if its programs agree with it.

    `runtimes` are the programs that must be built; by default those that can be, and the certificate says why another
    is missing. `origin` says where the source came from, for the manifest. `native` builds the `.pt2` for this CPU
    only, and `device` for "cpu" or "cuda". `portable` certifies all programs, and publishes only the portable ones.
    The result of `evaluate` becomes part of the certificate. Without `evaluate`, an earlier version of the same export
    provides it.
    `limits` are what the programs keep to, as in the file of `actserve export --limits`. Each program is fuzzed with
    `fuzzed` inputs; None: up to 100,000, as time allows.
    Raises `CaptureFailed`, `Disagreement`, `StoreError`, `UsageError` for limits that do not fit, and the errors of
    `evaluate`.
    """
    store = store if isinstance(store, ModelStore) else ModelStore(Path(store))
    progress("capturing the policy")
    torch.set_num_threads(1)  # small batches gain nothing from more, and lose much on a busy machine
    captured = capture(source)
    if limits is not None:
        progress("adding the limits")
        with explained("add the limits"):
            captured = limit(captured, limits if isinstance(limits, LimitsFile) else parse_limits(limits))
    insisted = runtimes is not None
    runtimes = _possible(runtimes or RUNTIMES, captured, progress)
    target = {"native": native, "device": device}  # of the .pt2
    fingerprint = _fingerprint(captured, source, target)
    existing = store.find(name, fingerprint)
    kept = [runtime for runtime in runtimes if not (portable and runtime in HOST_BOUND)]
    for artifact in existing:
        if not store.is_signed(artifact):
            continue
        missing = artifact.manifest.certificate.get(MISSING, {})
        needed = [runtime for runtime in kept if insisted or runtime not in missing]
        certificate = artifact.manifest.certificate
        if certificate.get("limits", {}).get("inputs", 0) < (fuzzed or 0):
            continue
        if _runs_here(artifact, needed) and (evaluate is None or EVALUATION in certificate):
            return Export(artifact, published=False)
    manifest = Manifest(
        format=WITHOUT_LIMITS if captured.signature.limits is None else FORMAT,
        name=name,
        version=1,
        parent=existing[0].manifest.version if existing else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        signature=captured.signature,
        environment=source.environment,
        programs={},
        files={},
        provenance={
            "fingerprint": fingerprint,
            "origin": origin,
            "weights_sha256": captured.weights_sha256(),
            "versions": _versions(),
        },
        certificate={},
    )
    with tempfile.TemporaryDirectory(prefix="actserve-") as name_of_folder:
        folder = Path(name_of_folder)
        programs, missing = {}, {}
        for runtime in runtimes:
            progress(f"building .{runtime}")
            try:
                with explained(f"build the .{runtime}"):
                    programs[runtime] = captured.build(runtime, folder, target)
            except CaptureFailed as error:
                if insisted or (runtime == runtimes[-1] and not programs):
                    raise
                progress(f"no .{runtime}: {error.message}")
                missing[runtime] = error.message
        files = {program.file: folder / program.file for program in programs.values()}
        with explained("save the program"):
            files |= {GRAPH: folder / GRAPH, **captured.save(folder, programs)}
        files[GRAPH].write_text(captured.graph())
        # A draft in a temporary store, so that certifying opens the programs in the same way as serving.
        draft = ModelStore(folder / "draft").publish(replace(manifest, programs=programs), files)
        evidence = certify.certify(captured, source, draft, progress, fuzzed)
        if missing:
            evidence.certificate[MISSING] = missing
        files[GOLDEN] = folder / GOLDEN
        files[GOLDEN].write_bytes(evidence.golden)
        certified = replace(draft.manifest, certificate=evidence.certificate)
        draft = ModelStore(folder / "certified").publish(certified, files)
        evaluation = evaluate(draft, progress) if evaluate else _evaluation(existing)
        for runtime in set(programs) - set(kept):
            del files[programs.pop(runtime).file]
        published = store.publish(
            replace(certified, programs=programs, certificate=evidence.certificate | evaluation), files
        )
    return Export(published, published=True)


def _evaluation(existing: Sequence[Artifact]) -> dict[str, Any]:
    """The evaluation in an earlier version of the same export, as part of a certificate."""
    for artifact in existing:
        if EVALUATION in artifact.manifest.certificate:
            return {EVALUATION: artifact.manifest.certificate[EVALUATION]}
    return {}


def _possible(runtimes: Sequence[str], captured: CapturedPolicy, progress: Callable[[str], None]) -> list[str]:
    """The `runtimes` that the captured policy can be built for. Raises `UsageError` if there are none."""
    possible = [runtime for runtime in runtimes if runtime in captured.runtimes]
    if not possible:
        raise UsageError(f"this policy can be built for {', '.join(captured.runtimes)}; got {', '.join(runtimes)}")
    for runtime in runtimes:
        if runtime not in possible:
            progress(f"no .{runtime}: the policy can be built for {', '.join(captured.runtimes)} only")
    return possible


def _fingerprint(captured: CapturedPolicy, source: ExportSource, target: dict[str, Any]) -> str:
    """The hash of an export: graph, weights, signature, environment, target, and the versions of the tools."""
    signature = asdict(captured.signature)
    if signature["limits"] is None:
        del signature["limits"]  # as in manifests; so an earlier export without limits is found
    identity = {
        "graph": captured.graph(),
        "weights": captured.weights_sha256(),
        "signature": signature,
        "environment": asdict(source.environment) if source.environment else None,
        "versions": _versions(),
        "target": target,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {"actserve": __version__} | {tool: metadata.version(tool).partition("+")[0] for tool in _TOOLS}


def _runs_here(artifact: Artifact, runtimes: Sequence[str]) -> bool:
    host = preflight.this_host()
    return all(preflight.refusal(runtime, artifact.manifest, host) is None for runtime in runtimes)
