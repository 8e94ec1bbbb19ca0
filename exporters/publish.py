"""The whole export, in order: capture, build, certify, publish."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from app import __version__
from app.artifact import FORMAT, GOLDEN, Artifact, Manifest, Program
from app.lazy import resolve
from app.runtimes import preflight
from app.store import ModelStore
from exporters import certify
from exporters.capture import Captured, capture
from exporters.optimize import optimize
from exporters.programs.exported import PROGRAM, save_program
from exporters.source import PolicySource

PROGRAMS = {"onnx": "exporters.programs.onnx:build", "pt2": "exporters.programs.aoti:build"}
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
    source: PolicySource,
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
    progress("capturing the policy with torch.export")
    torch.set_num_threads(1)  # small batches gain nothing from more, and lose much where cores are busy
    captured = capture(source)
    graph = readable(captured)
    target = {"native": native, "device": device}  # what the .pt2 is built for
    fingerprint = _fingerprint(captured, graph, source, target)
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
            "weights_sha256": _weights_digest(captured),
            "versions": _versions(),
        },
        certificate={},
    )
    with tempfile.TemporaryDirectory(prefix="actserve-") as name_of_folder:
        folder = Path(name_of_folder)
        files = {GRAPH: folder / GRAPH, PROGRAM: folder / PROGRAM}
        files[GRAPH].write_text(graph)
        save_program(captured.program, files[PROGRAM])
        programs = {runtime: _build(runtime, captured, folder, target, progress) for runtime in runtimes}
        files |= {program.file: folder / program.file for program in programs.values()}
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


def _build(
    runtime: str, captured: Captured, folder: Path, target: dict[str, Any], progress: Callable[[str], None]
) -> Program:
    """Rewrite the graph for one runtime and build its program file in `folder`."""
    progress(f"building .{runtime}")
    program, rewrites = optimize(captured.program, runtime)
    file = f"policy.{runtime}"
    options = target if runtime == "pt2" else {}
    requires = resolve(PROGRAMS[runtime])(replace(captured, program=program), folder / file, **options)
    return Program(file, requires, tuple(rewrites))


def readable(captured: Captured) -> str:
    """The graph as torch prints it, without the folders of the machine that it was traced on."""
    text: str = captured.program.graph_module.print_readable(print_output=False)
    return re.sub(r"# File: (?:[^\s:]*/(?:site|dist)-packages/|[^\s:]*/)", "# File: ", text)


def _fingerprint(captured: Captured, graph: str, source: PolicySource, target: dict[str, Any]) -> str:
    """What makes two exports the same thing: graph, weights, contract, and the tools that build them."""
    identity = {
        "graph": graph,
        "weights": _weights_digest(captured),
        "signature": asdict(captured.signature),
        "environment": asdict(source.environment) if source.environment else None,
        "versions": _versions(),
        "target": target,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _weights_digest(captured: Captured) -> str:
    digest = hashlib.sha256()
    tensors: dict[str, Any] = dict(captured.program.state_dict) | dict(captured.program.constants)
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    return {"actserve": __version__} | {tool: metadata.version(tool).partition("+")[0] for tool in _TOOLS}


def _runs_here(artifact: Artifact, runtimes: Sequence[str]) -> bool:
    host = preflight.this_host()
    return all(preflight.refusal(runtime, artifact.manifest, host) is None for runtime in runtimes)
