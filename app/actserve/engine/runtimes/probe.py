"""A trial run of a `.pt2` program in a child process, so that a crash does not end the service.

The program is native code: its constructors run when it is loaded, and an illegal instruction ends the process. A
child process therefore loads a new file first and runs it on blank observations. The child has to import torch, which
is slow, so a success is recorded in the user's cache directory, per file, torch version and machine.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from actserve.core.completion import blank_inputs
from actserve.core.errors import RuntimeFailure
from actserve.engine.runtimes.host import cpu_model, this_host
from actserve.engine.runtimes.package import inspect_package
from actserve.store.artifact import Artifact

LIMIT_S = 120.0  # the import of torch alone can take 30 s on a cold, busy machine
_BATCHES = (1, 8)
_ROOT = Path(__file__).parents[3]  # the folder that contains the package `actserve`


@contextmanager
def probed_copy(artifact: Artifact) -> Iterator[Path]:
    """A private, temporary copy of the artifact's `.pt2`, after its hash, contents and trial run were checked.

    Raises `StoreError` or `RuntimeFailure`.
    """
    data = artifact.read_program("pt2")
    if (reason := inspect_package(data)) is not None:
        raise RuntimeFailure(f"{artifact.label}: actserve refused the package: {reason}")
    with tempfile.TemporaryDirectory(prefix="actserve-") as folder:  # other users have no access
        copy = Path(folder) / "policy.pt2"
        copy.write_bytes(data)
        marker = _marker(data)
        if marker is None or not marker.exists():
            if (failure := trial_run(copy, artifact)) is not None:
                raise RuntimeFailure(f"{artifact.label}: {failure}")
            _create(marker)
        yield copy


def trial_run(path: Path, artifact: Artifact) -> str | None:
    """Load and run the package at `path` in a child process. Returns the failure, or None."""
    token = secrets.token_hex(8)
    signature = artifact.manifest.signature
    item = blank_inputs(signature, 1)
    task = {
        "path": str(path),
        "token": token,
        "device": artifact.manifest.programs["pt2"].requires.get("device") or "cpu",
        "inputs": [
            [spec.numpy_dtype.name, spec.shape, base64.b64encode(item[spec.name].tobytes()).decode()]
            for spec in signature.inputs
        ],
        "sizes": [size for size in _BATCHES if size <= signature.max_batch],
    }
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
        stdin.write(json.dumps(task).encode())
        stdin.seek(0)
        # A new session, so that `_kill` also ends the child's own children.
        child = subprocess.Popen(
            [sys.executable, "-m", "actserve.engine.runtimes.probe_child"],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            cwd=_ROOT,
            start_new_session=True,
        )
        try:
            code = child.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"the .pt2 program did not load and run within {LIMIT_S:g} seconds"
        finally:
            _kill(child)
        stdout.seek(0)
        return _failure(code, stdout.read(65536), token)


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _failure(code: int, stdout: bytes, token: str) -> str | None:
    """Why the child failed, or None."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        return f"the .pt2 program crashed its process on load (signal {name})"
    lines = stdout.decode(errors="replace").splitlines()
    if code == 0 and lines and lines[-1] == token:
        return None
    if lines and lines[-1].startswith(token):
        return f"the AOTI loader refused the package: {lines[-1].removeprefix(token).strip()}"
    return f"the .pt2 program ended its process on load (exit code {code})"


def _marker(data: bytes) -> Path | None:
    """The file that exists if these bytes have run on this host; None without a cache directory."""
    identity = {
        "file": hashlib.sha256(data).hexdigest(),
        "host": {**this_host().facts(), "cpu": cpu_model()},
        "python": [sys.executable, sys.version],
    }
    try:
        cache = platformdirs.user_cache_path("actserve")
    except RuntimeError:  # the user has no home
        return None
    return cache / "proven" / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _create(marker: Path | None) -> None:
    if marker is not None:
        with suppress(OSError):  # without a marker, the next load repeats the trial run
            marker.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            marker.touch(mode=0o600)
