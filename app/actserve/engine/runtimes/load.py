"""The runtimes by name. An engine is imported when its first program is loaded."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name

from actserve.engine.runtimes.base import Runtime
from actserve.store.artifact import Artifact

RUNTIMES = {
    "onnx": "actserve.engine.runtimes.onnx_runtime:OnnxRuntime",
    "pt2": "actserve.engine.runtimes.aoti_runtime:AotiRuntime",
}


def load(runtime: str, artifact: Artifact, threads: int = 1, shared: Path | None = None) -> Runtime:
    """Load the artifact's program for the runtime of this name. Raises as `Runtime.load`, whose arguments it takes."""
    artifact.check_trust(runtime)  # before the slow import of the engine
    implementation: type[Runtime] = resolve_name(RUNTIMES[runtime])
    return implementation.load(artifact, threads, shared)
