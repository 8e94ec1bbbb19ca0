"""The data of `policy --check`: golden samples, noise of some seeds, and an episode of the service."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np
from safetensors.numpy import save

from actserve.bundles.cpp import literals
from actserve.core.completion import complete, draw_noise, step_seed
from actserve.core.signature import IS_INIT, Array, Arrays, Noise, Signature
from actserve.engine import golden
from actserve.store.artifact import GOLDEN, Artifact, FileRecord

FILE = "samples.safetensors"  # noise and the episode
_SEEDS = ((0, 1), (7, 1), (7, 2), (2**63 - 1, 1000))  # (seed of an episode, step)
_ITEM = 1  # of a request
_DRAWS = 1024  # of each noise input, one after the other
_STEPS, _RESET, _SEED = 8, 5, 7  # of the episode; its sixth step begins anew


@dataclass(frozen=True)
class Samples:
    """`data` is the content of `FILE`, `header` that of golden.h, `checks` the names that `policy --check` takes."""

    data: bytes
    header: str
    checks: list[str]


def collect(artifact: Artifact) -> Samples:
    """The samples of an artifact.

    If it has an .onnx program, there is an episode that this program plays here. Raises as `golden.load`.
    """
    signature = artifact.manifest.signature
    inputs, _ = golden.read(artifact)
    count = len(next(iter(inputs.values())))
    steps = min(_STEPS, count) if "onnx" in artifact.manifest.programs else 0
    tensors = _noise(signature.noise) | (_episode(artifact, inputs, steps) if steps else {})
    data = save(tensors)
    tolerance = golden.Tolerance(**artifact.manifest.certificate["tolerance"])
    checks = ["single", "batched", *(["noise"] if signature.noise else []), *(["episode"] if steps else [])]
    sizes = (
        ("std::size_t", "items", f"{count}"),
        ("double", "absolute", f"{tolerance.absolute!r}"),
        ("double", "relative", f"{tolerance.relative!r}"),
        ("std::size_t", "draws", f"{_DRAWS}"),
        ("std::uint64_t", "episode_seed", f"{_SEED}"),
        ("std::size_t", "episode_steps", f"{steps}"),
        ("std::size_t", "episode_reset", f"{_RESET}"),
    )
    return Samples(
        data,
        _BEGIN
        + "".join(f"inline constexpr {kind} {name} = {value};\n" for kind, name, value in sizes)
        + literals.array("SeedAndStep", "seeds", [f"{{{seed}u, {step}u}}" for seed, step in _SEEDS])
        + _places(signature, artifact.read(GOLDEN), artifact.manifest.files[GOLDEN], data, bool(steps))
        + "\n}  // namespace actserve::golden\n",
        checks,
    )


_BEGIN = """// The golden samples: what `policy --check` compares. actserve wrote this file.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "actserve/spec.h"

namespace actserve::golden {

struct SeedAndStep {
  std::uint64_t seed, step;
};

// Where a tensor is in its file, row-major and little-endian.
struct Place {
  std::size_t offset, bytes;
};

"""


def _places(signature: Signature, trained: bytes, record: FileRecord, own: bytes, has_episode: bool) -> str:
    """Where the tensors are in the two files, in the order of the signature."""
    own_record = FileRecord(hashlib.sha256(own).hexdigest(), len(own))
    lists = (
        ("inputs", trained, [golden.INPUT + spec.name for spec in signature.inputs]),
        ("outputs", trained, [golden.OUTPUT + spec.name for spec in signature.results]),
        ("noise", own, [f"noise.{noise.spec.name}" for noise in signature.noise]),
        ("episode", own, [f"episode.{name}" for name in signature.output_names] if has_episode else []),
    )
    return "".join(
        (
            f"inline constexpr File file = {literals.file(GOLDEN, record)};  // inputs and outputs\n",
            f"inline constexpr File own_file = {literals.file(FILE, own_record)};  // noise and the episode\n",
            *(literals.array("Place", name, [_place(data, tensor) for tensor in names]) for name, data, names in lists),
        )
    )


def _place(data: bytes, name: str) -> str:
    """Where a tensor is in a safetensors file: its length in eight bytes, a header in JSON, then the tensors."""
    begin = 8 + int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8:begin])[name]["data_offsets"]
    return f"{{{begin + first}, {last - first}}}"


def _noise(noises: tuple[Noise, ...]) -> Arrays:
    """Each noise input as some seeds draw it, (seeds, draws, *shape)."""
    many = tuple(replace(noise, spec=replace(noise.spec, shape=(_DRAWS, *noise.spec.shape))) for noise in noises)
    drawn = [draw_noise(many, step_seed(seed, step), 1, _ITEM) for seed, step in _SEEDS]
    return {f"noise.{noise.spec.name}": np.concatenate([each[noise.spec.name] for each in drawn]) for noise in noises}


def _episode(artifact: Artifact, inputs: Arrays, steps: int) -> Arrays:
    """The outputs of an episode that sees the first golden observations, each (steps, *shape)."""
    signature = artifact.manifest.signature
    runtime = golden.load("onnx", artifact, 1)
    found: dict[str, list[Array]] = {name: [] for name in signature.output_names}
    state: Arrays = {}
    try:
        for step in range(steps):
            if step == _RESET:
                state = {IS_INIT.name: np.ones(1, bool)} if signature.is_init else {}
            request = {spec.name: inputs[spec.name][step : step + 1] for spec in signature.observations}
            seed = step_seed(_SEED, step + 1)
            results = runtime.run(complete(signature, request | state, 1, signature.exploration[-1], seed).inputs)
            state = {each.spec.name: results[each.output] for each in signature.state}
            for name, rows in found.items():
                rows.append(results[name])
    finally:
        runtime.close()
    return {f"episode.{name}": np.concatenate(rows) for name, rows in found.items()}
