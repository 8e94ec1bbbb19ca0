"""A narrower version of an artifact, published as `<name>-int8` or `<name>-bf16`, with a certificate of its own.

It is faster and gives slightly different results. The certificate says how often its actions equal the original's on
held-out inputs, how clear the original's choice was where they differ, and the scores of a game played with each. A
host must repeat the narrower program's own results, so these are its golden samples.

int8 is made from the `.onnx` program and runs in ONNX Runtime. bf16 is made from the exported program and runs as
`.pt2`.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from actserve.core.environment import Environment, game_of
from actserve.core.errors import CaptureFailed, Disagreement
from actserve.core.signature import Arrays
from actserve.engine import golden
from actserve.engine.golden import Tolerance
from actserve.engine.narrower import ORIGINAL
from actserve.engine.runtimes import preflight
from actserve.engine.runtimes.load import load
from actserve.store.artifact import GOLDEN, Artifact, Manifest, Program
from actserve.store.local import ModelStore
from actserve_export.certify import certify
from actserve_export.certify.limits import fuzz
from actserve_export.certify.narrow import Run, certify_narrow, golden_items
from actserve_export.programs.quantize import quantize as quantization
from actserve_export.programs.quantize.quantize import is_x86, quantize
from actserve_export.programs.rewrites.narrow import layers_in_bfloat16
from actserve_export.programs.rewrites.optimize import optimize
from actserve_export.publish import Export
from actserve_export.sources import samples
from actserve_export.sources.interfaces import ExportSource

SAMPLES = 4096  # half to calibrate, half held out; fewer cannot tell 99.4 % from 99.7 %
RUNTIMES = {"int8": "onnx", "bf16": "pt2"}

Precision = Literal["int8", "bf16"]
Play = Callable[[Run, Environment], Sequence[float]]  # plays the same games each time; their scores
Made = tuple[Program, dict[str, Any]]  # a program whose file is in the folder, and how it was made, JSON-able


def export_narrow(
    precision: Precision,
    original: Artifact,
    source: ExportSource,
    store: ModelStore,
    play: Play,
    progress: Callable[[str], None],
) -> Export:
    """Publish `original` in `precision`. Raises `CaptureFailed`, or `Disagreement` below 99.5 % agreement."""
    manifest, runtime = original.manifest, RUNTIMES[precision]
    fingerprint = f"{manifest.provenance['fingerprint']}-{precision}"
    for artifact in filter(store.is_signed, store.find(f"{manifest.name}-{precision}", fingerprint)):
        if preflight.refusal(runtime, artifact.manifest, preflight.this_host()) is None:
            return Export(artifact, published=False)
    progress(f"collecting {SAMPLES} samples to calibrate on and to hold out")
    inputs = samples.collect(source, manifest.signature, SAMPLES)
    calibration, held_out = ({k: v[start::2].copy() for k, v in inputs.items()} for start in (0, 1))
    environment = game_of(source.environment)
    games = (lambda run: play(run, environment)) if environment is not None else None
    with tempfile.TemporaryDirectory(prefix="actserve-") as name_of_folder:
        folder = Path(name_of_folder)
        made = _int8(original, calibration, folder) if precision == "int8" else _bf16(original, folder)
        draft, files = _first_certified(precision, original, made, held_out, games, folder, progress)
        draft = replace(draft, provenance={**draft.provenance, "fingerprint": fingerprint})
        return Export(store.publish(draft, files), published=True)


def _int8(original: Artifact, calibration: Arrays, folder: Path) -> Iterator[Made]:
    if "onnx" not in original.manifest.programs:
        raise CaptureFailed(f"int8 is made from the .onnx program, which {original.label} does not have")
    float32 = folder / "float32.onnx"
    float32.write_bytes(original.read_program("onnx"))
    full_range = not is_x86() or "avx512_vnni" in preflight.this_host().cpu_flags
    program = original.manifest.programs["onnx"]
    for data, made in quantize(float32, calibration, full_range=full_range):
        (folder / program.file).write_bytes(data)
        requires = {**program.requires, **made.pop("requires")}
        yield Program(program.file, requires, (*program.rewrites, f"int8: {made['method']}")), made


def _bf16(original: Artifact, folder: Path) -> Iterator[Made]:
    from actserve_export.programs.aoti import compile_program
    from actserve_export.programs.exported import PROGRAM, load_program

    if PROGRAM not in original.manifest.files:
        raise CaptureFailed(f"bf16 is made from the exported program, which {original.label} does not have")
    exported = load_program(original.read(PROGRAM), original.read)
    for wide in itertools.count():  # the next program has one layer more in float32
        program, rewrites = optimize(exported, "pt2", partial(layers_in_bfloat16, wide=wide))
        if not rewrites or not rewrites[-1].startswith("bfloat16"):
            break
        requires = compile_program(program, folder / "policy.pt2", bf16=True)
        yield Program("policy.pt2", requires, tuple(rewrites)), {"method": rewrites[-1], "wide_layers": wide}
    if not wide:
        raise CaptureFailed("bf16: expected a layer with weights before another one; the last layers stay in float32")


def _first_certified(
    precision: Precision,
    original: Artifact,
    candidates: Iterator[Made],
    held_out: Arrays,
    games: Callable[[Run], Sequence[float]] | None,
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and the files of the fastest program that passes."""
    runtime = RUNTIMES[precision]
    reference = "onnx" if "onnx" in original.manifest.programs else "pt2"
    theirs = load(reference, original)
    refused: Disagreement | None = None
    progress(f"building .{runtime} in {precision}")
    for program, made in candidates:
        files = {program.file: folder / program.file}
        draft = _draft(precision, original, program)
        ours = load(runtime, ModelStore(folder / "drafts").publish(draft, files))
        progress(f"certifying {precision} on {SAMPLES // 2} held-out samples, and playing a game with each")
        try:
            evidence, results = certify_narrow(
                precision, draft.signature, ours.run, theirs.run, held_out, quantization.AGREEMENT, games
            )
            items, tolerance = golden_items(draft.signature, results, certify.GOLDEN_SAMPLES)
            picked, outputs = ({k: v[items] for k, v in arrays.items()} for arrays in (held_out, results[1]))
            files[GOLDEN] = folder / GOLDEN
            files[GOLDEN].write_bytes(golden.save(picked, outputs))
            if draft.signature.limits is not None:
                progress(f"fuzzing the limits of .{runtime} in {precision}")
                fuzzed = fuzz(f".{runtime} in {precision}", ours.run_unchecked, draft.signature, held_out)
                evidence["limits"] = {"programs": {runtime: fuzzed.as_json()}}
        except Disagreement as error:
            refused = error  # the next program has more layers in floats
        else:
            evidence["reference"] = f"the float32 .{reference} program"
            certificate = _certificate(precision, draft, made, evidence, tolerance)
            theirs.close()
            return replace(draft, certificate=certificate), files
        finally:
            ours.close()
    assert refused is not None  # the candidates raise if there is none
    raise refused


def _draft(precision: Precision, original: Artifact, program: Program) -> Manifest:
    manifest = original.manifest
    return replace(
        manifest,
        name=f"{manifest.name}-{precision}",
        parent=manifest.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        programs={RUNTIMES[precision]: program},
        provenance={**manifest.provenance, ORIGINAL: original.label},
    )


def _certificate(
    precision: Precision, draft: Manifest, made: Mapping[str, Any], evidence: Mapping[str, Any], tolerance: Tolerance
) -> dict[str, Any]:
    """A certificate in the usual form, with an entry for the precision."""
    compared = {
        "compared": evidence["samples"],
        "action_disagreements": round((1 - evidence["agreement"]) * evidence["samples"]),
        "largest_difference": evidence["largest_difference"],
    }
    limits = {"limits": evidence["limits"]} if "limits" in evidence else {}
    return limits | {
        "samples": evidence["samples"],
        "samples_from": draft.certificate["samples_from"],
        "reference": evidence["reference"],
        "batch_sizes": evidence["batch_sizes"],
        "tolerance": asdict(tolerance),
        "smallest_margin": None,
        "programs": {RUNTIMES[precision]: compared},
        precision: {**made, **{name: value for name, value in evidence.items() if name not in limits}},
    }
