"""The inputs of each contender: screens of played games, the programs, and a store for each policy."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from actserve.engine import golden
from actserve.engine.tuning.tuned import tune_briefly
from actserve.store.local import ModelStore
from tests.benchmarks.peers.program import load
from tests.benchmarks.questions import Screens

CACHE = Path(".cache/benchmarks")  # what takes a minute to build, by the artifact and the exporter
EXPORTERS = Path("exporters")
SCREENS = 32


@dataclass(frozen=True)
class Ground:
    pixels: Path  # an .npy of (32, 210, 160, 3) u8
    programs: dict[str, Path]  # T's, and each policy's .onnx
    stores: dict[str, Path]  # by policy, with that policy alone
    screens: dict[str, Screens]  # by policy, with its own actions


def prepare(models: Path, policies: Collection[str] = ("pong",)) -> Ground:
    """For `policies` ("pong", "pong-int8", "pong-bf16"), from `pong` in the store `models`.

    Builds what is not in `CACHE`.
    """
    pong = ModelStore(models).resolve("pong").folder
    made_from = [pong / "manifest.json", *sorted(EXPORTERS.rglob("*.py"))]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in made_from)).hexdigest()[:12]
    folder = _once(CACHE / key, _tutorial)
    made = {
        "pong": lambda making: shutil.copytree(pong, making / "pong" / pong.name),
        "pong-int8": lambda making: _narrow(pong, making, "int8", "onnx"),
        "pong-bf16": lambda making: _narrow(pong, making, "bf16", "pt2"),
    }
    stores = {name: _once(CACHE / f"{key}-{name}", made[name]) for name in made if name in policies}
    for name, store in stores.items():  # as an export does; otherwise each start measures its own batch size
        tune_briefly(ModelStore(store).resolve(name), lambda _: None)
    programs = {"tutorial": folder / "tutorial.onnx"}
    artifacts = {name: ModelStore(store).resolve(name) for name, store in stores.items()}
    programs |= {
        name: artifact.folder / program.file
        for name, artifact in artifacts.items()
        for program in artifact.manifest.programs.values()
    }
    seen = load_file(pong / "golden.safetensors")["input.pixels"]
    pixels = np.resize(seen, (SCREENS, *seen.shape[1:]))  # repeated, if they are fewer
    np.save(folder / "pixels.npy", pixels)
    actions = {}
    for name, program in programs.items():
        if program.suffix == ".onnx":
            act = load(str(program))
            actions[name] = [act([screen.tobytes()])[0] for screen in pixels]
        else:
            runtime = golden.load("pt2", artifacts[name], 1)
            actions[name] = runtime.run({"pixels": pixels})["action"].tolist()
    if actions["tutorial"] != actions.get("pong", actions["tutorial"]):
        raise ValueError("the tutorial's program and the artifact's have different actions")
    screens = {name: Screens(pixels, actions[name]) for name in stores}
    return Ground(folder / "pixels.npy", programs, stores, screens)


def _once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, which `make` fills where it is missing."""
    if not folder.exists():
        making = folder.with_suffix(f".{os.getpid()}")
        making.mkdir(parents=True)
        make(making)
        making.rename(folder)
    return folder


def _tutorial(making: Path) -> None:
    _run("tests.benchmarks.tutorial", str(making / "tutorial.onnx"))


def _narrow(pong: Path, making: Path, precision: str, runtime: str) -> None:
    shutil.copytree(pong, making / "pong" / pong.name)
    _run("actserve", "export", "pong", "--runtime", runtime, "--precision", precision, "--store", str(making))
    shutil.rmtree(making / "pong")


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=sys.stderr)
