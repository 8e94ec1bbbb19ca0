"""Exports that tests share. Each is made once on a machine and kept in `.cache/exports` until its sources change.

Two commits can use the folder side by side: an entry's name has a hash of everything that the export depends on.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from actserve.engine.runtimes.preflight import this_host
from actserve.store.local import ModelStore

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "exports"
KEPT_S = 3 * 24 * 3600.0  # an entry that no test has used for that long is deleted
_APP = ROOT / "app" / "actserve"
_SOURCES = (
    *(ROOT / "exporters" / "actserve_export", _APP / "core", _APP / "store", _APP / "atari"),
    *(_APP / "engine" / "runtimes", _APP / "engine" / "golden.py", Path(__file__)),
)
_TOOLS = ("torch", "torchrl", "tensordict", "onnx", "onnxscript", "onnxruntime", "numpy", "stable_baselines3")


def exported(target: str, runtimes: Sequence[str] = ("onnx", "pt2")) -> ModelStore:
    """A store with version 1 of what `actserve export target` publishes. Tests that change it copy it first."""

    def make(folder: Path) -> None:
        from actserve_export.publish import export
        from actserve_export.targets import load

        name, source = load(target)
        export(source, name, ModelStore(folder), origin=target, runtimes=runtimes)

    module, _, factory = target.rpartition(":")
    name = "-".join([factory, *runtimes])
    return ModelStore(made_once(name, make, [_file_of(module)] if module else []))


def made_once(name: str, make: Callable[[Path], None], sources: Iterable[Path]) -> Path:
    """The folder that `make` fills. `sources` are the files that it depends on beside the exporter's own.

    The first process to need the folder makes it, and others wait. An unfinished folder is never used.
    """
    folder = CACHE / f"{name}-{_fingerprint(sources)}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _delete_unused()
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as making:
                made = Path(making) / "made"
                made.mkdir()
                make(made)
                made.rename(folder)
        os.utime(folder)
    return folder


def merged(stores: Iterable[ModelStore], root: Path) -> ModelStore:
    """A new store in `root` with a copy of everything in `stores`."""
    for store in stores:
        shutil.copytree(store.root, root, dirs_exist_ok=True)
    return ModelStore(root)


def _delete_unused() -> None:
    for entry in CACHE.iterdir():
        if entry.is_dir() and entry.stat().st_mtime < time.time() - KEPT_S:
            shutil.rmtree(entry, ignore_errors=True)


def _fingerprint(sources: Iterable[Path]) -> str:
    digest = hashlib.sha256(_common().encode())
    for source in sources:
        digest.update(_content(source))
    return digest.hexdigest()[:16]


@cache
def _common() -> str:
    """A hash of what every export depends on: the exporter, the libraries that it uses, and this host."""
    files = [file for source in _SOURCES for file in ([source] if source.is_file() else sorted(source.rglob("*.*")))]
    digest = hashlib.sha256()
    for file in files:
        if file.suffix in (".py", ".safetensors"):
            digest.update(str(file.relative_to(ROOT)).encode())
            digest.update(_content(file))
    versions = {tool: metadata.version(tool) for tool in _TOOLS} | {"python": platform.python_version()}
    digest.update(json.dumps([this_host().facts(), versions], sort_keys=True).encode())
    return digest.hexdigest()


def _content(file: Path) -> bytes:
    """The file's bytes; of Python its syntax tree, so that a new comment or docstring exports nothing again."""
    if file.suffix != ".py":
        return file.read_bytes()
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.dump(tree).encode()


def _file_of(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)
