"""What the contenders stand on: screens of played games, the programs, and a store for each policy."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from actserve.store.local import ModelStore
from tests.benchmarks.peers.program import load
from tests.benchmarks.questions import Screens

CACHE = Path(".cache/benchmarks")  # what takes a minute to build, by the artifact and the exporter
EXPORTERS = Path("exporters")


@dataclass(frozen=True)
class Ground:
    pixels: Path  # an .npy of (32, 210, 160, 3) u8
    programs: dict[str, Path]  # T's, and each policy's .onnx
    stores: dict[str, Path]  # by policy, with that policy alone
    screens: dict[str, Screens]  # by policy, with its own actions


def prepare(models: Path) -> Ground:
    """For `pong` of the store `models`: T's program and an int8 artifact are built unless they were before."""
    pong = ModelStore(models).resolve("pong").folder
    made_from = [pong / "manifest.json", *sorted(EXPORTERS.rglob("*.py"))]
    folder = CACHE / hashlib.sha256(b"".join(file.read_bytes() for file in made_from)).hexdigest()[:12]
    stores = {name: folder / name for name in ("pong", "pong-int8")}
    if not folder.exists():
        build(pong, folder.with_suffix(f".{os.getpid()}"), folder)
    int8 = ModelStore(stores["pong-int8"]).resolve("pong-int8").folder
    programs = {
        "tutorial": folder / "tutorial.onnx",
        "pong": pong / "policy.onnx",
        "pong-int8": int8 / "policy.onnx",
    }
    pixels = load_file(pong / "golden.safetensors")["input.pixels"]
    np.save(folder / "pixels.npy", pixels)
    actions = {}
    for name, program in programs.items():
        act = load(str(program))
        actions[name] = [act([screen.tobytes()])[0] for screen in pixels]
    if actions["tutorial"] != actions["pong"]:
        raise ValueError("the tutorial's program and the artifact's have different actions")
    screens = {name: Screens(pixels, actions[name]) for name in stores}
    return Ground(folder / "pixels.npy", programs, stores, screens)


def build(pong: Path, making: Path, folder: Path) -> None:
    shutil.copytree(pong, making / "pong" / "pong" / pong.name)
    store = making / "pong-int8"
    for arguments in (
        ["tests.benchmarks.tutorial", str(making / "tutorial.onnx")],
        ["actserve", "export", "pong", "--runtime", "onnx", "--int8", "--store", str(store)],
    ):
        subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=sys.stderr)
    shutil.rmtree(store / "pong")
    making.rename(folder)
