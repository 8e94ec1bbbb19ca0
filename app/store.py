"""ModelStore: the folder of artifacts. Publishing is atomic; what was published never changes.

<root>/<name>/<version>/manifest.json  policy.onnx  policy.pt2  golden.safetensors
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from app.artifact import MANIFEST, Artifact, FileRecord, Manifest
from app.errors import InvalidManifest, InvalidName, MisplacedVersion, StoreError, UnknownPolicy, UnknownVersion

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
STAGING = ".staging-"


class ModelStore:
    """A folder of artifacts. Holds no state: every call looks at the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """The policies that have at least one version, sorted."""
        return [name for name in self._folders(self.root, NAME) if self._folders(self.root / name, VERSION)]

    def versions(self, name: str) -> list[int]:
        """All versions of `name`, ascending, whether or not they can be served. Raises `UnknownPolicy`."""
        known = self.names()
        if name not in known:  # looked up, never joined from a request
            raise UnknownPolicy(name, known)
        return sorted(int(version) for version in self._folders(self.root / name, VERSION))

    def resolve(self, name: str, version: int | None = None) -> Artifact:
        """The artifact `name`@`version`, by default the highest. Raises `NotFound` or the `StoreError` it has."""
        versions = self.versions(name)
        if version is None:
            version = versions[-1]
        if version not in versions:
            raise UnknownVersion(name, version, versions)
        artifact = Artifact.open(self.root / name / str(version), f"{name}@{version}")
        found = (artifact.manifest.name, artifact.manifest.version)
        if found != (name, version):
            raise MisplacedVersion(
                f"{name}@{version}: its manifest says {found[0]}@{found[1]}: the folder was renamed or copied",
                expected=f"{name}@{version}",
                got=f"{found[0]}@{found[1]}",
            )
        return artifact

    def verify(self, artifact: Artifact) -> None:
        """Read and hash every file. Raises the first `StoreError`."""
        for name in artifact.manifest.files:
            artifact.read(name)

    def find(self, name: str, fingerprint: str) -> list[Artifact]:
        """The good versions that were exported from the same thing in the same way, the newest first."""
        found: list[Artifact] = []
        if name not in self.names():
            return found
        for version in reversed(self.versions(name)):
            try:
                artifact = self.resolve(name, version)
                self.verify(artifact)
            except StoreError:
                continue
            if artifact.manifest.provenance.get("fingerprint") == fingerprint:
                found.append(artifact)
        return found

    def publish(self, manifest: Manifest, files: Mapping[str, Path]) -> Artifact:
        """Copy `files` (by the name they get) into a new version, which appears whole or not at all.

        The manifest's version and files are filled in here. Two publishers at once get two versions. On any failure,
        a full disk among them, nothing is left behind and the error goes on.
        """
        if not NAME.fullmatch(manifest.name):
            raise InvalidName(manifest.name)
        if MANIFEST in files:
            raise InvalidManifest(f"{MANIFEST} is written by the store, not published")
        home = self.root / manifest.name
        home.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=home))
        try:
            staging.chmod(0o755)
            records = {name: _copy(source, staging / name) for name, source in files.items()}
            return self._appear(staging, dataclasses.replace(manifest, files=records))
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # gone already when it was renamed

    def _appear(self, staging: Path, manifest: Manifest) -> Artifact:
        home = staging.parent
        while True:
            taken = [int(version) for version in self._folders(home, VERSION)]
            manifest = dataclasses.replace(manifest, version=max(taken, default=0) + 1)
            _write(staging / MANIFEST, manifest.to_json())
            _sync(staging)
            try:
                os.rename(staging, home / str(manifest.version))
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    continue  # somebody else took that number
                raise
            _sync(home)
            return self.resolve(manifest.name, manifest.version)

    @staticmethod
    def _folders(parent: Path, pattern: re.Pattern[str]) -> list[str]:
        try:
            entries = list(os.scandir(parent))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e.name for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False))


def _copy(source: Path, target: Path) -> FileRecord:
    data = source.read_bytes()
    _write(target, data)
    return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


def _write(target: Path, data: bytes) -> None:
    with open(target, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
