"""RemoteStore: a read-only store behind a URL that fsspec opens (s3://, gs://, file://, …).

A version is downloaded into the user's cache directory, atomically, and verified. It is then used like a version of a
local store, with one difference: its native code runs only if a trusted key signed it, because the owner of the cache
directory did not make it. Downloaded versions stay usable while the remote store is unreachable.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from actserve.core.errors import (
    ActserveError,
    CorruptFile,
    MissingFile,
    NewerManifest,
    NotFetched,
    StoreError,
    StoreUnreachable,
    UnfinishedVersion,
    UnknownPolicy,
    UsageError,
)
from actserve.core.imports import import_extra
from actserve.store.artifact import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    SIGNATURE,
    SIGNATURE_LIMIT_BYTES,
    Artifact,
    FileRecord,
    Manifest,
)
from actserve.store.local import NAME, STAGING, VERSION, ModelStore, check_identity, open_version
from actserve.store.trust import Trust
from actserve.store.trust.ownership import untrusted_reason

log = logging.getLogger("actserve")

VERSION_LIMIT_BYTES = 16 << 30
CHUNK_BYTES = 1 << 20


def open_store(location: str, trust: Trust | None = None) -> ModelStore:
    """The store in a folder or behind a URL. Raises `UsageError` for a URL that fsspec cannot open."""
    return RemoteStore(location, trust) if "://" in location else ModelStore(Path(location), trust)


class RemoteStore(ModelStore):
    """`refresh` lists the remote store, and `resolve` downloads a version. `root` is the cache.

    `names` and `versions` return the last listing or, before the first one, the versions in the cache.
    """

    def __init__(self, url: str, trust: Trust | None = None) -> None:
        try:
            cache = platformdirs.user_cache_path("actserve")
        except RuntimeError as error:  # the user has no home
            raise UsageError("a remote store needs a cache directory: set XDG_CACHE_HOME to one") from error
        super().__init__(cache / "stores" / hashlib.sha256(url.encode()).hexdigest()[:16], trust)
        connect = import_extra("remote", "fsspec.core:url_to_fs")
        try:
            self._remote, self._base = connect(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UsageError(f"no store can be opened at {url.partition('://')[0]}://: {error}") from error
        self._listed: dict[str, list[int]] | None = None  # None: not listed yet

    def refresh(self) -> None:
        """List the remote store. Raises `StoreUnreachable` and keeps the last listing."""
        names = self._list(self._base, NAME)
        if names is None:
            raise StoreUnreachable("there is no store where the remote store should be")
        listed = {name: sorted(map(int, self._list(f"{self._base}/{name}", VERSION) or ())) for name in sorted(names)}
        self._listed = {name: versions for name, versions in listed.items() if versions}

    def names(self) -> list[str]:
        return super().names() if self._listed is None else list(self._listed)

    def versions(self, name: str) -> list[int]:
        if self._listed is None:
            return super().versions(name)
        if name not in self._listed:
            raise UnknownPolicy(name, self.names())
        return self._listed[name]

    def publish(self, manifest: Manifest, files: Mapping[str, Path]) -> Artifact:
        raise UsageError("a remote store is read only: publish to a local folder and upload it, manifest.json last")

    def _open(self, name: str, version: int, fetch: bool) -> Artifact:
        folder = self.root / name / str(version)
        if not self._is_cached(folder, name, version):
            if not fetch:
                raise NotFetched(f"{name}@{version} is in the remote store, and this service has not fetched it")
            self._fetch(folder, name, version)
        folder = folder.resolve()
        if (reason := untrusted_reason(folder)) is not None:
            raise StoreError(f"{name}@{version}: other users could have changed the fetched files: {reason}")
        return open_version(folder, name, version, self._trust, fetched=True)

    def _is_cached(self, folder: Path, name: str, version: int) -> bool:
        """Whether the version is in the cache and intact. A damaged one is deleted."""
        if not folder.is_dir():
            return False
        try:
            self.verify(open_version(folder, name, version, Trust()))
        except NewerManifest:
            return True  # written by a newer actserve, not damaged
        except StoreError as error:
            log.warning("the fetched version is damaged: %s", error.message)
            shutil.rmtree(folder, ignore_errors=True)
            return False
        return True

    def _fetch(self, folder: Path, name: str, version: int) -> None:
        label, source = f"{name}@{version}", f"{self._base}/{name}/{version}"
        data = self._read(f"{source}/{MANIFEST}", MANIFEST_LIMIT_BYTES + 1, label)
        if data is None:
            raise UnfinishedVersion(f"{label}: there is no {MANIFEST} in the remote store")
        signature = self._read(f"{source}/{SIGNATURE}", SIGNATURE_LIMIT_BYTES + 1, label)
        self._trust.signer(label, data, signature)
        manifest = Manifest.from_json(data, label)
        check_identity(manifest, name, version)
        size = sum(record.bytes for record in manifest.files.values())
        if size > VERSION_LIMIT_BYTES:
            raise StoreError(f"{label} has {size:,} bytes; at most {VERSION_LIMIT_BYTES:,} are fetched")
        log.info("fetching %s: %.1f MB", label, size / 1e6)
        try:
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=STAGING, dir=folder.parent, ignore_cleanup_errors=True) as staging:
                for file, record in manifest.files.items():
                    self._download(f"{source}/{file}", Path(staging, file), record, label)
                if signature is not None:
                    Path(staging, SIGNATURE).write_bytes(signature)
                Path(staging, MANIFEST).write_bytes(data)
                try:
                    os.rename(staging, folder)
                except OSError:
                    if not folder.is_dir():  # if it exists, another process was faster
                        raise
        except OSError as error:
            raise StoreError(f"{label} cannot be written to the cache: {error.strerror}") from error

    def _download(self, source: str, target: Path, record: FileRecord, label: str) -> None:
        digest, size = hashlib.sha256(), 0
        with open(target, "xb") as file:
            for chunk in self._chunks(source, record.bytes + 1, label):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if size != record.bytes or digest.hexdigest() != record.sha256:
            raise CorruptFile(f"{label}: {target.name} in the remote store differs from the manifest", file=target.name)

    def _list(self, path: str, pattern: re.Pattern[str]) -> list[str] | None:
        """The names of the folders in `path` that match `pattern`; None if `path` does not exist."""
        with _translate_errors("the remote store"):
            try:
                entries = self._remote.ls(path, detail=True)
            except FileNotFoundError:
                return None
        names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
        return [name for name in names if pattern.fullmatch(name)]

    def _read(self, path: str, limit_bytes: int, label: str) -> bytes | None:
        """At most `limit_bytes` of a remote file; None if it does not exist."""
        try:
            return b"".join(self._chunks(path, limit_bytes, label))
        except MissingFile:
            return None

    def _chunks(self, path: str, limit_bytes: int, label: str) -> Iterator[bytes]:
        with _translate_errors(label):
            try:
                with self._remote.open(path, "rb") as file:
                    while limit_bytes and (chunk := file.read(min(CHUNK_BYTES, limit_bytes))):
                        yield chunk
                        limit_bytes -= len(chunk)
            except FileNotFoundError:
                name = path.rpartition("/")[2]
                raise MissingFile(f"{label}: {name} is not in the remote store", file=name) from None


@contextmanager
def _translate_errors(subject: str) -> Iterator[None]:
    """Any exception becomes `StoreUnreachable`: fsspec's backends pass on the exceptions of their libraries."""
    try:
        yield
    except ActserveError:
        raise
    except Exception as error:
        log.warning("the remote store: %s: %s", type(error).__name__, error)
        raise StoreUnreachable(f"{subject} cannot be reached ({type(error).__name__})") from error
