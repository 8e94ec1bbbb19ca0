"""Writes the files of a C++ bundle, and builds it to run its own check."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from string import Template

from actserve.bundles.checks import run_check
from actserve.bundles.cpp import header, readme, samples, tables
from actserve.core.errors import UsageError
from actserve.store.artifact import Artifact

_FILES = Path(__file__).with_name("files")
_NOT_FOR = {"onnx": ("pt2*",), "pt2": ("onnx*", "Dockerfile")}


def write(artifact: Artifact, runtime: str, folder: Path) -> None:
    """Raises a `StoreError`, and `RuntimeFailure` if the .onnx program does not repeat the golden samples here."""
    shutil.copytree(_FILES, folder, ignore=shutil.ignore_patterns(*_NOT_FOR[runtime]), dirs_exist_ok=True)
    written = samples.collect(artifact)
    text = Template((folder / "README.md").read_text())
    (folder / samples.FILE).write_bytes(written.data)
    for path, content in (
        ("bundle.cmake", f"set(BUNDLE_RUNTIME {runtime})\nset(BUNDLE_CHECKS {' '.join(written.checks)})\n"),
        ("include/actserve/signature.h", header.signature(artifact.manifest, runtime)),
        ("src/golden.h", written.header),
        ("src/ziggurat.h", tables.header()),
        ("README.md", text.substitute(readme.words(artifact.manifest, runtime))),
    ):
        (folder / path).write_text(content)


def verify(folder: Path, runtime: str) -> dict[str, str]:
    """Build in `folder`/build, and run `policy --check`. The libraries are those of this Python's packages.

    Raises `UsageError` without a compiler or CMake.
    """
    cmake = tool("cmake")
    tool("c++")
    run_check([cmake, "-S", ".", "-B", "build", *libraries(runtime)], folder)
    run_check([cmake, "--build", "build"], folder)
    said = run_check(["build/policy", "--check"], folder)
    return dict(re.findall(r"^built with: (.+) (\S+)$", said, re.MULTILINE))


def tool(name: str) -> str:
    """The path of a program, also of one that a Python package has brought. Raises `UsageError`."""
    found = shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent)
    if found is None:
        raise UsageError(f"expected {name}, to build the bundle; it is not installed")
    return found


def libraries(runtime: str) -> list[str]:
    """Arguments with which CMake finds the libraries in the packages of this Python. Raises `UsageError`."""
    package = {"onnx": "onnxruntime", "pt2": "torch"}[runtime]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"expected the Python package {package}, which has the libraries; {sys.executable} has none")
    root = Path(spec.submodule_search_locations[0])
    return [
        f"-DONNXRUNTIME_ROOT={root / 'capi'}" if runtime == "onnx" else f"-DCMAKE_PREFIX_PATH={root / 'share/cmake'}"
    ]
