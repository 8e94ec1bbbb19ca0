"""Build the `.pt2` for this host from a stored artifact, with torch and a C++ compiler: no TorchRL, no user code."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from actserve.core.errors import CaptureFailed, Disagreement
from actserve.engine import golden
from actserve.engine.golden import Agreement
from actserve.engine.runtimes import preflight
from actserve.engine.runtimes.load import load
from actserve.store.artifact import Artifact, Manifest, Program
from actserve.store.local import ModelStore
from actserve_export.certify.limits import fuzz
from actserve_export.programs import aoti
from actserve_export.programs.exported import PROGRAM, load_program

PT2 = "policy.pt2"


def compile(  # noqa: A001, the command's name
    artifact: Artifact,
    store: ModelStore,
    progress: Callable[[str], None] = lambda step: None,
    native: bool = False,
    device: str = "cpu",
) -> Artifact:
    """Publish `artifact` with a `.pt2` for this host as the next version, if it repeats the golden samples.

    If a version of the same export already has such a `.pt2`, returns that version. `native` builds for this CPU only,
    and `device` for "cpu" or "cuda". Raises `CaptureFailed`, `Disagreement` or `StoreError`.
    """
    manifest = artifact.manifest
    if PROGRAM not in manifest.files:
        raise CaptureFailed(
            f"{artifact.label} holds no {PROGRAM}, the exported program to compile from; export the policy again"
        )
    if (existing := _existing(artifact, store, native, device)) is not None:
        return existing
    progress(f"reading {PROGRAM}")
    torch.set_num_threads(1)
    program = load_program(artifact.read(PROGRAM), artifact.read)
    with tempfile.TemporaryDirectory(prefix="actserve-") as folder:
        files = _copies(artifact, Path(folder))
        progress(f"building .pt2 for {aoti.march_for(native) if device == 'cpu' else device}")
        files[PT2] = Path(folder) / PT2
        requires = aoti.compile_program(program, files[PT2], native, device)
        draft = _publish(ModelStore(Path(folder) / "draft"), manifest, requires, files, {})
        progress("certifying .pt2 against the golden samples")
        evidence = _certify(draft)
        limits = _fuzz_limits(draft, progress)
        return _publish(store, manifest, requires, files, evidence, limits)


def _existing(artifact: Artifact, store: ModelStore, native: bool, device: str = "cpu") -> Artifact | None:
    """A version of the same export whose `.pt2` runs here and was built for the same target."""
    fingerprint = artifact.manifest.provenance.get("fingerprint")
    for found in store.find(artifact.manifest.name, fingerprint) if fingerprint else []:
        program = found.manifest.programs.get("pt2")
        if program is None or not store.is_signed(found):
            continue
        built_for = program.requires.get("march"), program.requires.get("device") or "cpu"
        if built_for != (aoti.march_for(native), device):
            continue
        if preflight.refusal("pt2", found.manifest, preflight.this_host()) is None:
            return found
    return None


def _copies(artifact: Artifact, folder: Path) -> dict[str, Path]:
    """Copies of the artifact's files without its `.pt2`, verified, in `folder`."""
    old = artifact.manifest.programs.get("pt2")
    files: dict[str, Path] = {}
    for name in artifact.manifest.files:
        if old is None or name != old.file:
            files[name] = folder / name
            files[name].write_bytes(artifact.read(name))
    return files


def _publish(
    store: ModelStore,
    parent: Manifest,
    requires: dict[str, Any],
    files: dict[str, Path],
    evidence: dict[str, Any],
    limits: dict[str, Any] | None = None,
) -> Artifact:
    compiled_from = {
        "version": parent.version,
        "program_sha256": parent.files[PROGRAM].sha256,
        "torch": torch.__version__.partition("+")[0],
    }
    certified = {**parent.certificate.get("programs", {}), "pt2": evidence}
    certificate = {**parent.certificate, "programs": certified}
    if limits is not None:
        shown = parent.certificate["limits"]
        certificate["limits"] = {**shown, "programs": {**shown["programs"], "pt2": limits}}
    return store.publish(
        replace(
            parent,
            parent=parent.version,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            programs={**parent.programs, "pt2": Program(PT2, requires)},
            provenance={**parent.provenance, "compiled_from": compiled_from},
            certificate=certificate,
        ),
        files,
    )


def _fuzz_limits(draft: Artifact, progress: Callable[[str], None]) -> dict[str, Any] | None:
    """The certificate's entry on the limits of the `.pt2`; None if it has none. Its samples are the golden ones."""
    signature = draft.manifest.signature
    if signature.limits is None:
        return None
    progress("fuzzing the limits of .pt2")
    runtime = load("pt2", draft)
    try:
        return fuzz(".pt2", runtime.run_unchecked, signature, golden.read(draft)[0]).as_json()
    finally:
        runtime.close()


def _certify(draft: Artifact) -> dict[str, Any]:
    runtime = load("pt2", draft)
    try:
        agreement: Agreement = golden.check(draft, runtime.run)
    finally:
        runtime.close()
    if not agreement.holds:
        raise Disagreement(
            f".pt2, compiled here, does not repeat the golden samples: nothing was published. "
            f"{len(agreement.differing)} of {agreement.compared} actions differ; "
            f"beyond tolerance: {', '.join(agreement.exceeding) or 'none'}",
            runtime="pt2",
            **agreement.summary(),
        )
    return {
        "compared": agreement.compared,
        "action_disagreements": len(agreement.differing),
        "largest_difference": dict(agreement.largest_difference),
        "against": "golden samples",
    }
