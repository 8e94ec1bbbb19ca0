"""RemoteStore: a store behind a URL that fsspec opens (s3://, gs://, file://, …), to read from.

A version is fetched into the user's cache folder, whole and verified or not at all. From there on it is what a version
of a local store is, but for one thing: that it lies in a folder of this user's says nothing about who made it, so its
native code is run only if a trusted key signed it. What was fetched stays usable when the store no longer answers.
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
from actserve.store.cache import cache_folder
from actserve.store.local import NAME, STAGING, VERSION, ModelStore, check_place, opened
from actserve.store.trust import Trust
from actserve.store.trust.ownership import meddler

log = logging.getLogger("actserve")

VERSION_LIMIT_BYTES = 16 << 30
CHUNK_BYTES = 1 << 20


def open_store(location: str, trust: Trust | None = None) -> ModelStore:
    """The store in a folder, or behind a URL. Raises `UsageError` for a URL that nothing here opens."""
    return RemoteStore(location, trust) if "://" in location else ModelStore(Path(location), trust)


class RemoteStore(ModelStore):
    """`refresh` asks what there is, `resolve` fetches; `names` and `versions` answer from what was found last, or
    from what was fetched before. `root` is the cache."""

    def __init__(self, url: str, trust: Trust | None = None) -> None:
        cache = cache_folder()
        if cache is None:
            raise UsageError("a remote store needs a folder for what it fetches: set XDG_CACHE_HOME to one")
        super().__init__(cache / "stores" / hashlib.sha256(url.encode()).hexdigest()[:16], trust)
        connect = import_extra("remote", "fsspec.core:url_to_fs")
        try:
            self._remote, self._base = connect(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UsageError(f"no store can be opened at {url.partition('://')[0]}://: {error}") from error
        self._listed: dict[str, list[int]] | None = None  # None: the store has not answered yet

    def refresh(self) -> None:
        """Raises `StoreUnreachable`; what was found before is still known."""
        names = self._list(self._base, NAME)
        if names is None:
            raise StoreUnreachable("there is no store where the remote store should be")
        found = {name: sorted(map(int, self._list(f"{self._base}/{name}", VERSION) or ())) for name in sorted(names)}
        self._listed = {name: versions for name, versions in found.items() if versions}

    def names(self) -> list[str]:
        return super().names() if self._listed is None else list(self._listed)

    def versions(self, name: str) -> list[int]:
        if self._listed is None:
            return super().versions(name)
        if name not in self._listed:
            raise UnknownPolicy(name, self.names())
        return self._listed[name]

    def publish(self, manifest: Manifest, files: Mapping[str, Path]) -> Artifact:
        raise UsageError("a remote store is read only: publish into a folder and copy that there, manifest.json last")

    def _open(self, name: str, version: int, fetch: bool) -> Artifact:
        folder = self.root / name / str(version)
        if not self._is_whole(folder, name, version):
            if not fetch:
                raise NotFetched(f"{name}@{version} is in the remote store, and was not fetched by this service")
            self._fetch(folder, name, version)
        folder = folder.resolve()
        if (reason := meddler(folder)) is not None:
            raise StoreError(f"{name}@{version}: others could have changed what was fetched: {reason}")
        return opened(folder, name, version, self._trust, fetched=True)

    def _is_whole(self, folder: Path, name: str, version: int) -> bool:
        """Whether the version was fetched and still is what it was. What is damaged is deleted."""
        if not folder.is_dir():
            return False
        try:
            self.verify(opened(folder, name, version, Trust()))
        except NewerManifest:
            return True  # another actserve's, not damage
        except StoreError as error:
            log.warning("what was fetched is damaged: %s", error.message)
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
        check_place(manifest, name, version)
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
                    if not folder.is_dir():  # else another process was faster
                        raise
        except OSError as error:
            raise StoreError(f"{label} cannot be kept: {error.strerror}") from error

    def _download(self, source: str, target: Path, record: FileRecord, label: str) -> None:
        digest, size = hashlib.sha256(), 0
        with open(target, "xb") as file:
            for chunk in self._chunks(source, record.bytes + 1, label):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if size != record.bytes or digest.hexdigest() != record.sha256:
            raise CorruptFile(
                f"{label}: {target.name}, as the remote store has it, is not what the manifest says", file=target.name
            )

    def _list(self, path: str, pattern: re.Pattern[str]) -> list[str] | None:
        """The folders of this kind in a remote one; None if that is not there."""
        with _reaching("the remote store"):
            try:
                entries = self._remote.ls(path, detail=True)
            except FileNotFoundError:
                return None
        names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
        return [name for name in names if pattern.fullmatch(name)]

    def _read(self, path: str, limit_bytes: int, label: str) -> bytes | None:
        """At most `limit_bytes` of a remote file; None if it is not there."""
        try:
            return b"".join(self._chunks(path, limit_bytes, label))
        except MissingFile:
            return None

    def _chunks(self, path: str, limit_bytes: int, label: str) -> Iterator[bytes]:
        with _reaching(label):
            try:
                with self._remote.open(path, "rb") as file:
                    while limit_bytes and (chunk := file.read(min(CHUNK_BYTES, limit_bytes))):
                        yield chunk
                        limit_bytes -= len(chunk)
            except FileNotFoundError:
                name = path.rpartition("/")[2]
                raise MissingFile(f"{label}: {name} is not in the remote store", file=name) from None


@contextmanager
def _reaching(what: str) -> Iterator[None]:
    """fsspec's backends raise whatever their libraries do."""
    try:
        yield
    except ActserveError:
        raise
    except Exception as error:
        log.warning("the remote store: %s: %s", type(error).__name__, error)
        raise StoreUnreachable(f"{what} cannot be reached ({type(error).__name__})") from error
