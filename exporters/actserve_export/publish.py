"""The whole export, in order: capture, build, certify, publish."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from actserve import __version__
from actserve.core.errors import UsageError
from actserve.engine.runtimes import preflight
from actserve.store.artifact import FORMAT, GOLDEN, Artifact, Manifest
from actserve.store.local import ModelStore
from actserve_export.capture import capture
from actserve_export.certify import certify
from actserve_export.sources.interfaces import Exportable, Source

HOST_BOUND = ("pt2",)  # native code
EVALUATION = "evaluation"  # of the certificate: the games that the policy played
GRAPH = "graph.txt"
_TOOLS = ("torch", "torchrl", "tensordict", "onnx", "onnxscript", "onnxruntime", "numpy")


# An artifact that serves as it will be published, and where to tell the progress -> {EVALUATION: JSON-able}.
Evaluate = Callable[[Artifact, Callable[[str], None]], dict[str, Any]]


@dataclass(frozen=True)
class Export:
    """What an export came to. `published` is False when the store already held the same thing for this host."""

    artifact: Artifact
    published: bool


def export(
    source: Source,
    name: str,
    store: ModelStore,
    *,
    origin: str,
    runtimes: Sequence[str] = ("onnx", "pt2"),
    native: bool = False,
    device: str = "cpu",
    portable: bool = False,
    evaluate: Evaluate | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Export:
    """Publish `source` as the next version of `name`, if and only if its programs agree with it.

    `origin` says where the source came from, for the manifest. `native` builds the `.pt2` for this CPU alone,
    `device` for "cpu" or "cuda". `portable` leaves out, once it is certified, what only hosts like this one can run.
    What `evaluate` finds becomes part of the certificate; without it, what was found of the same export before does.
    Raises `CaptureFailed`, `Disagreement`, `StoreError`, and what `evaluate` raises.
    """
    progress("capturing the policy")
    torch.set_num_threads(1)  # small batches gain nothing from more, and lose much where cores are busy
    captured = capture(source)
    runtimes = _possible(runtimes, captured, progress)
    target = {"native": native, "device": device}  # what the .pt2 is built for
    fingerprint = _fingerprint(captured, source, target)
    existing = store.find(name, fingerprint)
    kept = [runtime for runtime in runtimes if not (portable and runtime in HOST_BOUND)]
    for artifact in existing:
        if not store.is_signed(artifact):
            continue
        if _runs_here(artifact, kept) and (evaluate is None or EVALUATION in artifact.manifest.certificate):
            return Export(artifact, published=False)
    manifest = Manifest(
        format=FORMAT,
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
        programs = {}
        for runtime in runtimes:
            progress(f"building .{runtime}")
            programs[runtime] = captured.build(runtime, folder, target)
        files = {program.file: folder / program.file for program in programs.values()}
        files |= {GRAPH: folder / GRAPH, **captured.save(folder, programs)}
        files[GRAPH].write_text(captured.graph())
        # The draft is an artifact in a store of its own: what is certified is opened as what is served will be.
        draft = ModelStore(folder / "draft").publish(replace(manifest, programs=programs), files)
        evidence = certify.certify(captured, source, draft, progress)
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
    """What the same export scored before, for a certificate."""
    for artifact in existing:
        if EVALUATION in artifact.manifest.certificate:
            return {EVALUATION: artifact.manifest.certificate[EVALUATION]}
    return {}


def _possible(runtimes: Sequence[str], captured: Exportable, progress: Callable[[str], None]) -> list[str]:
    """Of `runtimes` those that the captured policy can be built for; `UsageError` for none."""
    possible = [runtime for runtime in runtimes if runtime in captured.runtimes]
    if not possible:
        raise UsageError(f"this policy can be built for {', '.join(captured.runtimes)}; got {', '.join(runtimes)}")
    for runtime in runtimes:
        if runtime not in possible:
            progress(f"no .{runtime}: the policy can be built for {', '.join(captured.runtimes)} alone")
    return possible


def _fingerprint(captured: Exportable, source: Source, target: dict[str, Any]) -> str:
    """What makes two exports the same thing: graph, weights, contract, and the tools that build them."""
    identity = {
        "graph": captured.graph(),
        "weights": captured.weights_sha256(),
        "signature": asdict(captured.signature),
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
