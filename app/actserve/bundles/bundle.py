"""Writes a bundle of an artifact for one target, and verifies a bundle on this host.

Each target is a module, a `TargetModule`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from actserve import __version__
from actserve.bundles import Runtime, Target
from actserve.core.errors import UsageError
from actserve.engine.runtimes.host import cpu_model, this_host
from actserve.store.artifact import GOLDEN, MANIFEST, Artifact, Manifest

MODULES: dict[Target, str] = {
    "browser": "actserve.bundles.browser.target",
    "cpp": "actserve.bundles.cpp.target",
    "python": "actserve.bundles.python.target",
}
RUNTIMES: dict[Target, tuple[Runtime, ...]] = {"browser": ("onnx",), "cpp": ("onnx", "pt2"), "python": ("onnx",)}
BUNDLE = "bundle.json"
NOTES = "bundles"  # the file beside an artifact


class TargetModule(Protocol):
    def write(self, artifact: Artifact, runtime: Runtime, folder: Path) -> None:
        """Fill the new folder, which has the manifest, the program and the golden samples already."""

    def verify(self, folder: Path, runtime: Runtime) -> dict[str, str]:
        """Run the golden samples -> what ran them, with versions. Raises `RuntimeFailure`, or `UsageError`."""


@dataclass(frozen=True)
class Verified:
    """Where the golden samples of a bundle were repeated. `host` has the platform, `tools` the versions of what ran."""

    target: Target
    runtime: Runtime
    at: str  # ISO 8601, UTC
    host: str
    tools: dict[str, str]

    def __str__(self) -> str:
        tools = ", ".join(f"{name} {version}" for name, version in self.tools.items())
        return f"{self.target} (.{self.runtime}) on {self.host} with {tools}, {self.at[:10]}"


def write(artifact: Artifact, target: Target, runtime: Runtime, folder: Path) -> list[Path]:
    """Write the bundle into `folder`, which must be new or empty -> its files. All of it appears at once.

    Raises `UsageError`, a `StoreError`, or OSError.
    """
    if runtime not in RUNTIMES[target]:
        raise UsageError(f"expected --runtime {' or '.join(RUNTIMES[target])} for the target {target}; got {runtime}")
    if runtime not in artifact.manifest.programs:
        has = ", ".join(artifact.manifest.programs)
        raise UsageError(f"expected a .{runtime} program in {artifact.label}; it has {has}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"expected a new or an empty folder; {folder} has files")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        staging.chmod(0o755)
        (staging / MANIFEST).write_bytes(artifact.manifest.to_json())
        (staging / GOLDEN).write_bytes(artifact.read(GOLDEN))
        (staging / artifact.manifest.programs[runtime].file).write_bytes(artifact.read_program(runtime))
        facts = {"format": 1, "target": target, "runtime": runtime, "actserve": __version__}
        (staging / BUNDLE).write_text(json.dumps(facts, indent=1) + "\n")
        _module(target).write(artifact, runtime, staging)
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return sorted(path for path in folder.rglob("*") if path.is_file())


def verify(folder: Path) -> tuple[Manifest, Verified]:
    """Run the golden samples of a bundle with the bundle's own code.

    Raises `RuntimeFailure` if they are not repeated, `UsageError` for a folder that is no bundle or a missing tool, and
    `InvalidManifest`.
    """
    try:
        facts = json.loads((folder / BUNDLE).read_bytes())
        target, runtime = facts["target"], facts["runtime"]
        known = runtime in RUNTIMES[target]
        manifest_data = (folder / MANIFEST).read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        lacks = f"{folder} has no {BUNDLE} of a known target, or no {MANIFEST}"
        raise UsageError(f"expected a folder that `actserve bundle` wrote; {lacks}")
    manifest = Manifest.from_json(manifest_data, str(folder))
    tools = _module(target).verify(folder, runtime)
    host = f"{this_host().facts()['platform']} ({cpu_model()})"
    return manifest, Verified(target, runtime, datetime.now(UTC).isoformat(timespec="seconds"), host, tools)


def note(artifact: Artifact, verified: Verified) -> None:
    """Remember in the store where a bundle of the artifact was verified; the last time for each target and host."""
    kept = [each for each in noted(artifact) if _key(each) != _key(verified)]
    artifact.write_beside(NOTES, [vars(each) for each in (*kept, verified)])


def noted(artifact: Artifact) -> list[Verified]:
    """Where bundles of the artifact were verified; none if the store's file cannot be read."""
    try:
        found: list[dict[str, Any]] = json.loads(artifact.beside(NOTES).read_bytes())
        return [Verified(**each) for each in found]
    except (OSError, ValueError, TypeError):
        return []


def _key(verified: Verified) -> tuple[str, str, str, tuple[tuple[str, str], ...]]:
    return verified.target, verified.runtime, verified.host, tuple(sorted(verified.tools.items()))


def _module(target: Target) -> TargetModule:
    return cast(TargetModule, import_module(MODULES[target]))
