"""onnxruntime-web: the files of its npm package that a bundle needs, of a pinned version with a known hash."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

from platformdirs import user_cache_path

from actserve.core.errors import CorruptFile, UsageError

VERSION = "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
PACKAGE = f"onnxruntime-web-{VERSION}.tgz"
VARIABLE = "ACTSERVE_ONNXRUNTIME_WEB"  # names a file with the package, where npm cannot be asked
LIMIT_S = 300.0


def write(folder: Path) -> None:
    """Write the files, and the licence, into `folder`, which is made. Raises `UsageError` or `CorruptFile`."""
    data = _package()
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != SHA512:
        raise CorruptFile(f"{PACKAGE}: expected SHA-512 {SHA512[:12]}…; got {digest[:12]}…")
    folder.mkdir()
    with tarfile.open(fileobj=BytesIO(data)) as package:
        for name in FILES:
            member = package.extractfile(f"package/dist/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())


def _package() -> bytes:
    """The package: the file that the variable names, the one that was fetched before, or a new one from npm."""
    if given := os.environ.get(VARIABLE):
        try:
            return Path(given).read_bytes()
        except OSError as error:
            raise UsageError(f"expected {VARIABLE} to name {PACKAGE}; {given}: {error.strerror}") from None
    kept = user_cache_path("actserve") / PACKAGE
    if not kept.is_file():
        _fetch(kept)
    return kept.read_bytes()


def _fetch(kept: Path) -> None:
    advice = f"install npm, or name a file with the package in {VARIABLE}"
    if (npm := shutil.which("npm")) is None:
        raise UsageError(f"expected npm, to fetch onnxruntime-web {VERSION}: {advice}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--silent"]
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if found.returncode or not (Path(folder) / PACKAGE).is_file():
            said = found.stderr.strip().splitlines()
            raise UsageError(
                f"npm could not fetch onnxruntime-web {VERSION} ({said[-1] if said else 'no reason'}): {advice}"
            )
        (Path(folder) / PACKAGE).replace(kept)
