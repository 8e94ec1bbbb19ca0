"""An artifact's `.onnx` program in int8, published as another artifact, `<name>-int8`, with its own certificate.

An int8 program gives slightly different results. Its certificate says how often its actions equal the original's on
held-out screens, and the scores of a game played with each. A host must repeat the int8 program's results, so these are
its golden samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from actserve.core.environment import Environment, game_of
from actserve.core.errors import Disagreement
from actserve.core.signature import Arrays
from actserve.engine import golden
from actserve.engine.runtimes import preflight
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.load import load
from actserve.store.artifact import GOLDEN, Artifact, Manifest, Program
from actserve.store.local import ModelStore
from actserve_export.certify import certify
from actserve_export.programs.quantize.quantize import Run, certify_int8, is_x86, quantize
from actserve_export.publish import Export
from actserve_export.sources import samples
from actserve_export.sources.interfaces import ExportSource

SAMPLES = 4096  # half to calibrate, half held out; fewer cannot tell 99.4 % from 99.7 %
ONNX = "policy.onnx"

Play = Callable[[Run, Environment], Sequence[float]]  # plays the same games each time; their scores


def export_int8(
    original: Artifact, source: ExportSource, store: ModelStore, play: Play, progress: Callable[[str], None]
) -> Export:
    """Quantise `original`'s `.onnx` and publish it. Raises `CaptureFailed` or `Disagreement` below 99.5 % agreement."""
    manifest = original.manifest
    fingerprint = f"{manifest.provenance['fingerprint']}-int8"
    for artifact in filter(store.is_signed, store.find(f"{manifest.name}-int8", fingerprint)):
        return Export(artifact, published=False)
    progress(f"collecting {SAMPLES} samples to calibrate on and to hold out")
    inputs = samples.collect(source, manifest.signature, SAMPLES)
    calibration, held_out = ({k: v[start::2].copy() for k, v in inputs.items()} for start in (0, 1))
    environment = game_of(source.environment)
    games = (lambda run: play(run, environment)) if environment is not None else None
    with tempfile.TemporaryDirectory(prefix="actserve-") as name_of_folder:
        folder = Path(name_of_folder)
        draft, ours = _first_certified(original, calibration, held_out, games, folder, progress)
        chosen = np.linspace(0, SAMPLES // 2 - 1, certify.GOLDEN_SAMPLES).astype(int)
        picked = {k: v[chosen] for k, v in held_out.items()}
        (folder / GOLDEN).write_bytes(golden.save(picked, golden.in_batches(ours.run, picked, 1)))
        ours.close()
        draft = replace(draft, provenance={**draft.provenance, "fingerprint": fingerprint})
        files = {ONNX: folder / ONNX, GOLDEN: folder / GOLDEN}
        return Export(store.publish(draft, files), published=True)


def _first_certified(
    original: Artifact,
    calibration: Arrays,
    held_out: Arrays,
    games: Callable[[Run], Sequence[float]] | None,
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[Manifest, Runtime]:
    """The manifest and the loaded runtime of the fastest int8 program that passes; its file is in `folder`."""
    theirs = load("onnx", original)
    float32 = folder / "float32.onnx"
    float32.write_bytes(original.read_program("onnx"))
    full_range = not is_x86() or "avx512_vnni" in preflight.this_host().cpu_flags
    refused: Disagreement | None = None
    progress("quantising")
    for program, made in quantize(float32, calibration, full_range=full_range):
        (folder / ONNX).write_bytes(program)
        draft = _draft(original, made)
        ours = load("onnx", ModelStore(folder / "drafts").publish(draft, {ONNX: folder / ONNX}))
        progress(f"certifying int8 on {SAMPLES // 2} held-out samples, and playing a game with each")
        try:
            evidence = certify_int8(draft.signature, ours.run, theirs.run, held_out, games)
        except Disagreement as error:
            ours.close()
            refused = error  # the next program has more layers in floats
        else:
            theirs.close()
            return replace(draft, certificate=_certificate(draft, made, evidence)), ours
    assert refused is not None  # `quantize` raises if it finds no program
    raise refused


def _draft(original: Artifact, made: Mapping[str, Any]) -> Manifest:
    manifest, program = original.manifest, original.manifest.programs["onnx"]
    rewrites = (*program.rewrites, f"int8: {made['method']}")
    return replace(
        manifest,
        name=f"{manifest.name}-int8",
        parent=manifest.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        programs={"onnx": Program(ONNX, {**program.requires, **made["requires"]}, rewrites)},
        provenance={**manifest.provenance, "quantised_from": original.label},
    )


def _certificate(draft: Manifest, made: Mapping[str, Any], evidence: Mapping[str, Any]) -> dict[str, Any]:
    """A certificate in the usual form, with the entry "int8"."""
    compared = {
        "compared": evidence["samples"],
        "action_disagreements": round((1 - evidence["agreement"]) * evidence["samples"]),
        "largest_difference": evidence["largest_difference"],
    }
    return {
        "samples": evidence["samples"],
        "samples_from": draft.certificate["samples_from"],
        "reference": evidence["reference"],
        "batch_sizes": evidence["batch_sizes"],
        "tolerance": asdict(certify.TOLERANCE),
        "smallest_margin": None,
        "programs": {"onnx": compared},
        "int8": {**{key: value for key, value in made.items() if key != "requires"}, **evidence},
    }
