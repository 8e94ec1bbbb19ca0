"""The bundle for C++, cross-compiled for aarch64: its golden samples run under qemu-user."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from actserve.bundles import bundle as bundles
from actserve.bundles.cpp.target import tool
from tests.bundled import artifact_of
from tests.bundled_cpp import needs_compiler, run

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / ".venv" / "aarch64" / "onnxruntime" / "capi"
READY = LIBRARY.exists() and all(map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64")))
pytestmark = [needs_compiler, pytest.mark.skipif(not READY, reason="run .ci/aarch64 as root")]


def test_the_golden_samples_are_repeated_on_aarch64(tmp_path: Path) -> None:
    folder, build = tmp_path / "bundle", tmp_path / "build"
    bundles.write(artifact_of("tanh_normal"), "cpp", "onnx", folder)
    toolchain = folder / "cmake" / "onnx-aarch64.cmake"
    options = [f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", f"-DONNXRUNTIME_ROOT={LIBRARY}", "-DCMAKE_BUILD_TYPE=None"]
    run(tool("cmake"), "-S", str(folder), "-B", str(build), *options)
    run(tool("cmake"), "--build", str(build), "--parallel", "2")
    assert (build / "policy").read_bytes()[18:20] == b"\xb7\0", "an executable for aarch64"
    assert "100% tests passed, 0 tests failed out of 4" in run(tool("ctest"), "--test-dir", str(build))
    emulated = ("qemu-aarch64", "-L", str(build / "aarch64"), str(build / "policy"))
    assert "noise: noise: the same" in run(*emulated, "--check", "--folder", str(folder))
