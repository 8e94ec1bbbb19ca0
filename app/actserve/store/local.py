"""ModelStore: the folder of artifacts. Publishing is atomic; a published version never changes.

<root>/<name>/<version>/manifest.json  manifest.sig  policy.onnx  policy.pt2  golden.safetensors
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
from typing import TYPE_CHECKING

from actserve.core.errors import (
    InvalidManifest,
    InvalidName,
    MisplacedVersion,
    StoreError,
    StoreUnreachable,
    UnknownPolicy,
    UnknownVersion,
)
from actserve.store.artifact import FILE_NAME, MANIFEST, SIGNATURE, Artifact, FileRecord, Manifest
from actserve.store.trust import Trust

if TYPE_CHECKING:
    from actserve.store.trust.signing import PrivateKey

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
STAGING = ".staging-"


class ModelStore:
    """A folder of artifacts. Holds no state: every call reads the folder.

    `trust` applies to opened artifacts. With `key`, published artifacts are signed.
    """

    def __init__(self, root: Path, trust: Trust | None = None, key: PrivateKey | None = None) -> None:
        self.root = root
        self._trust = trust or Trust()
        self._key = key
        if key is not None:
            self._trust = dataclasses.replace(self._trust, keys=(*self._trust.keys, key.public))

    def refresh(self) -> None:
        """Check that the store can be read; a remote store is listed anew. Raises `StoreUnreachable`."""
        try:
            self.root.stat()
        except OSError as error:
            raise StoreUnreachable(f"the folder of the store cannot be read: {error.strerror}") from None

    def names(self) -> list[str]:
        """The policies that have at least one version, sorted."""
        return [name for name in self._folders(self.root, NAME) if self._folders(self.root / name, VERSION)]

    def versions(self, name: str) -> list[int]:
        """All versions of `name`, ascending, even if they cannot be served. Raises `UnknownPolicy`."""
        # The name may come from a request: it is looked up before it becomes part of a path.
        found = self._folders(self.root / name, VERSION) if name in self._folders(self.root, NAME) else []
        if not found:
            raise UnknownPolicy(name, self.names())
        return sorted(map(int, found))

    def resolve(self, name: str, version: int | None = None, fetch: bool = True) -> Artifact:
        """The artifact `name`@`version`, by default the highest. Raises `NotFound` or a `StoreError`.

        A remote store downloads a missing version if `fetch` is true.
        """
        versions = self.versions(name)
        if version is None:
            version = versions[-1]
        if version not in versions:
            raise UnknownVersion(name, version, versions)
        return self._open(name, version, fetch)

    def _open(self, name: str, version: int, fetch: bool) -> Artifact:
        # Resolve symbolic links once, so that all checks and reads see the same folder.
        folder = (self.root / name / str(version)).resolve()
        return open_version(folder, name, version, self._trust)

    def verify(self, artifact: Artifact) -> None:
        """Read and hash every file. Raises the first `StoreError`."""
        for name in artifact.manifest.files:
            artifact.read(name)

    def find(self, name: str, fingerprint: str) -> list[Artifact]:
        """The intact versions whose provenance has this fingerprint, newest first."""
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

    def is_signed(self, artifact: Artifact) -> bool:
        """Whether this store's key signed `artifact`; true for a store without a key."""
        return self._key is None or artifact.signer == self._key.public.fingerprint

    def publish(self, manifest: Manifest, files: Mapping[str, Path]) -> Artifact:
        """Copy `files` (target name -> source) into a new version, atomically.

        Sets the manifest's `version` and `files`. Concurrent publishers get different versions. After a failure, such
        as a full disk, nothing is left behind. Raises a `StoreError`.
        """
        if not NAME.fullmatch(manifest.name):
            raise InvalidName(manifest.name)
        for name in files:
            if name in (MANIFEST, SIGNATURE) or not re.fullmatch(FILE_NAME, name):
                raise InvalidManifest(f"{name[:100]!r} cannot be published: a reserved name, or not a file name")
        home = self.root / manifest.name
        try:
            home.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=home))
            try:
                staging.chmod(0o755)
                records = {name: _copy(source, staging / name) for name, source in files.items()}
                version = self._rename_to_version(staging, dataclasses.replace(manifest, files=records))
            finally:
                shutil.rmtree(staging, ignore_errors=True)  # does not exist after the rename
        except OSError as error:
            raise StoreError(f"{manifest.name} was not published: {error.strerror}") from error
        return self.resolve(manifest.name, version)

    def _rename_to_version(self, staging: Path, manifest: Manifest) -> int:
        home = staging.parent
        while True:
            taken = [int(version) for version in self._folders(home, VERSION)]
            manifest = dataclasses.replace(manifest, version=max(taken, default=0) + 1)
            data = manifest.to_json()
            _write(staging / MANIFEST, data)
            if self._key is not None:
                _write(staging / SIGNATURE, self._key.sign(data))
            _sync(staging)
            try:
                os.rename(staging, home / str(manifest.version))
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    continue  # another publisher took that number
                raise
            _sync(home)
            return manifest.version

    @staticmethod
    def _folders(parent: Path, pattern: re.Pattern[str]) -> list[str]:
        try:
            entries = list(os.scandir(parent))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e.name for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False))


def open_version(folder: Path, name: str, version: int, trust: Trust, fetched: bool = False) -> Artifact:
    """The artifact in `folder`, which must be `name`@`version`. Raises a `StoreError`."""
    artifact = Artifact.open(folder, f"{name}@{version}", trust, fetched)
    check_identity(artifact.manifest, name, version)
    return artifact


def check_identity(manifest: Manifest, name: str, version: int) -> None:
    """Raises `MisplacedVersion` unless the manifest is that of `name`@`version`."""
    expected, got = f"{name}@{version}", f"{manifest.name}@{manifest.version}"
    if got != expected:
        raise MisplacedVersion(
            f"{expected}: its manifest says {got}: the folder was renamed or copied", expected=expected, got=got
        )


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
