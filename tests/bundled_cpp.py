"""Bundles for C++, built once on a machine, and a driver of their program."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from actserve.bundles import Runtime
from actserve.bundles import bundle as bundles
from actserve.bundles.cpp.target import libraries, tool
from actserve.core.errors import UsageError
from actserve.core.signature import Arrays, Signature
from actserve.store.artifact import Artifact
from tests.bundled import artifact_of
from tests.exported import exported, made_once

RESET, RANDOM, SEED, COUNT, PARAMETERS, SHARED = 1, 2, 4, 8, 16, 32  # flags of frames
FILES = Path(bundles.__file__).parent / "cpp"


def _missing() -> str:
    """The error if this host has no compiler or no CMake; otherwise empty."""
    try:
        tool("cmake")
        tool("c++")
    except UsageError as error:
        return error.message
    return ""


needs_compiler = pytest.mark.skipif(bool(_missing()), reason=_missing())


def artifact(name: str, runtime: Runtime) -> Artifact:
    if runtime == "onnx":
        return artifact_of(name)
    return exported(f"tests.policies:{name}").resolve(name.replace("_", "-"))


def built(name: str, runtime: Runtime = "onnx", optimized: bool = False) -> Path:
    """The folder of a policy's bundle, built: for tests as fast as that goes, or `optimized` as users build it."""
    found = artifact(name, runtime)

    def make(folder: Path) -> None:
        bundles.write(found, "cpp", runtime, folder)
        build(folder, runtime, optimized)

    sources = [path for path in sorted(FILES.rglob("*.*")) if path.is_file() and path.suffix != ".pyc"]
    return made_once(f"cpp-{name}-{runtime}{'-release' * optimized}", make, [*sources, found.folder / "manifest.json"])


def build(folder: Path, runtime: Runtime, optimized: bool = False) -> None:
    """Warnings of the compiler are errors."""
    flags = [] if optimized else ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1 -Werror"]
    run(tool("cmake"), "-S", str(folder), "-B", str(folder / "build"), *flags, *libraries(runtime))
    run(tool("cmake"), "--build", str(folder / "build"), "--parallel", "2")


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


class Refused(Exception):
    """The program answered with an error."""


class Driver:
    """A running `policy` with `--outputs all`."""

    def __init__(self, process: subprocess.Popen[bytes], signature: Signature) -> None:
        self.process = process
        self.signature = signature

    def step(
        self,
        tensors: Mapping[str, object],
        flags: int = 0,
        seed: int | None = None,
        count: int | None = None,
        parameters: Sequence[float] = (),
    ) -> Arrays:
        """The outputs for observations of one item, (*shape) each, or of `count` items, (count, *shape)."""
        head = b"" if seed is None else struct.pack("<Q", seed)
        head += b"" if count is None else struct.pack("<I", count)
        head += np.array(parameters, "<f4").tobytes()
        given = (seed is not None) * SEED | (count is not None) * COUNT | bool(parameters) * PARAMETERS
        specs = [] if flags & SHARED else self.signature.observations
        body = b"".join(spec.to_wire(np.asarray(tensors[spec.name], spec.numpy_dtype)).tobytes() for spec in specs)
        answer = self.exchange(bytes([flags | given]) + head + body)
        found: Arrays = {}
        for spec in self.signature.outputs:
            size = spec.item_bytes * (count or 1)
            part, answer = answer[:size], answer[size:]
            shape = spec.shape if count is None else (count, *spec.shape)
            found[spec.name] = spec.from_wire(np.frombuffer(part, spec.wire_dtype).reshape(shape))
        assert not answer
        return found

    def exchange(self, frame: bytes) -> bytes:
        """The answer to one frame, without its status. Raises `Refused`."""
        assert self.process.stdin is not None
        self.process.stdin.write(struct.pack("<I", len(frame)) + frame)
        self.process.stdin.flush()
        return self.receive()

    def receive(self) -> bytes:
        assert self.process.stdout is not None
        length, status = struct.unpack("<IB", self.process.stdout.read(5))
        rest = self.process.stdout.read(length - 1)
        if status:
            raise Refused(rest.decode())
        return rest


@contextmanager
def driven(program: Path, signature: Signature, *options: str) -> Iterator[Driver]:
    """The program must end with exit code 0 when its input ends."""
    command = [str(program), "--outputs", "all", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr) as process:
        try:
            yield Driver(process, signature)
        except BaseException:
            process.kill()
            raise
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
