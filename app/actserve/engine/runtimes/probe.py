"""A trial run of a `.pt2` program in a process of its own: what crashes there does not crash the service.

The program is native code: its constructors run as it is loaded, and one illegal instruction ends the process. So a
file that this host has not run before is first loaded and run on zeros by a child. That costs an import of torch, so
what passed is remembered, for this file, this torch and this machine, in a cache folder of the user's.
"""

from __future__ import annotations

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

from actserve.core.errors import RuntimeFailure
from actserve.engine.runtimes.host import cpu_model, this_host
from actserve.engine.runtimes.package import inspect_package
from actserve.store.artifact import Artifact
from actserve.store.cache import cache_folder

LIMIT_S = 120.0  # importing torch alone can take half a minute on a cold, busy machine
_BATCHES = (1, 8)
_ROOT = Path(__file__).parents[3]  # where `actserve` is imported from


@contextmanager
def proven(artifact: Artifact) -> Iterator[Path]:
    """A private copy of the artifact's `.pt2`: hashed, looked into, and run in a child. Deleted afterwards.

    Raises `StoreError`, or `RuntimeFailure` with what is wrong with it.
    """
    data = artifact.read_program("pt2")
    if (reason := inspect_package(data)) is not None:
        raise RuntimeFailure(f"{artifact.label}: actserve refused the package: {reason}")
    with tempfile.TemporaryDirectory(prefix="actserve-") as folder:  # that nobody else can look or write into
        copy = Path(folder) / "policy.pt2"
        copy.write_bytes(data)
        marker = _marker(data)
        if marker is None or not marker.exists():
            if (reason := crash(copy, artifact)) is not None:
                raise RuntimeFailure(f"{artifact.label}: {reason}")
            _remember(marker)
        yield copy


def crash(path: Path, artifact: Artifact) -> str | None:
    """Load and run the package at `path` in a child; what went wrong, or None."""
    token = secrets.token_hex(8)
    signature = artifact.manifest.signature
    task = {
        "path": str(path),
        "token": token,
        "device": artifact.manifest.programs["pt2"].requires.get("device") or "cpu",
        "inputs": [[spec.dtype, spec.shape] for spec in signature.inputs],
        "sizes": [size for size in _BATCHES if size <= signature.max_batch],
    }
    with tempfile.TemporaryFile() as orders, tempfile.TemporaryFile() as answer:
        orders.write(json.dumps(task).encode())
        orders.seek(0)
        # A session of its own, so that whatever it starts ends with it.
        child = subprocess.Popen(
            [sys.executable, "-m", "actserve.engine.runtimes.probe_child"],
            stdin=orders,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            cwd=_ROOT,
            start_new_session=True,
        )
        try:
            code = child.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"the .pt2 program did not load and run within {LIMIT_S:g} seconds"
        finally:
            _end(child)
        answer.seek(0)
        return _verdict(code, answer.read(65536), token)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _verdict(code: int, answer: bytes, token: str) -> str | None:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        return f"the .pt2 program crashed its process on load (signal {name})"
    lines = answer.decode(errors="replace").splitlines()
    if code == 0 and lines and lines[-1] == token:
        return None
    if lines and lines[-1].startswith(token):
        return f"the AOTI loader refused the package: {lines[-1].removeprefix(token).strip()}"
    return f"the .pt2 program ended its process on load (exit code {code})"


def _marker(data: bytes) -> Path | None:
    """The file whose presence says that these bytes ran here. None where there is no place for it."""
    identity = {
        "file": hashlib.sha256(data).hexdigest(),
        "host": {**this_host().facts(), "cpu": cpu_model()},
        "python": [sys.executable, sys.version],
    }
    folder = cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder / "proven" / digest


def _remember(marker: Path | None) -> None:
    if marker is not None:
        with suppress(OSError):  # then it is tried again next time
            marker.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            marker.touch(mode=0o600)
