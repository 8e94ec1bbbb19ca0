"""Manifest and Artifact: one immutable version of one policy, and the record that describes it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from actserve.core.environment import Environment
from actserve.core.errors import (
    CorruptFile,
    InvalidManifest,
    MissingFile,
    NewerManifest,
    UnexpectedFile,
    UnfinishedVersion,
    UntrustedProgram,
)
from actserve.core.signature import Signature
from actserve.store.trust import Trust
from actserve.store.trust.ownership import meddler

FORMAT = 1  # of the manifest; a reader refuses what is newer than itself
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"  # 64 bytes, over those of the manifest; not every version has one
GOLDEN = "golden.safetensors"
NATIVE = ("pt2",)  # runtimes whose programs are machine code: to load one is to run it
MANIFEST_LIMIT_BYTES = 4 << 20
SIGNATURE_LIMIT_BYTES = 64
FILE_LIMIT_BYTES = 4 << 30  # files are read whole
FILES_LIMIT = 64
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


@dataclass(frozen=True)
class FileRecord:
    """What one file of an artifact is: its SHA-256 in hexadecimal, and its size."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, le=FILE_LIMIT_BYTES)]


Files = Annotated[dict[Annotated[str, Field(pattern=FILE_NAME)], FileRecord], Field(max_length=FILES_LIMIT)]


@dataclass(frozen=True)
class Program:
    """One program file and what it needs of the host that runs it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    file: str
    requires: dict[str, Any] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()  # what was done to the captured graph before it was built


@dataclass(frozen=True)
class Manifest:
    """The store's record of one artifact. Written once, never changed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    name: str
    version: int
    parent: int | None  # the version that this one was made from, for another host
    created: str  # ISO 8601, UTC
    signature: Signature
    environment: Environment | None
    programs: dict[str, Program]  # by runtime name
    files: Files  # everything in the folder but the manifest and its signature
    provenance: dict[str, Any]  # where it came from: factory, checkpoint, fingerprint, versions
    certificate: dict[str, Any]  # the evidence that the programs do what the policy does

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`, which a signature is of."""
        return json.dumps(self.to_dict(), indent=1).encode() + b"\n"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able. A Manifest is all data: nothing in it names a path or a host."""
        dumped: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return dumped

    @staticmethod
    def from_json(data: bytes, where: str) -> Manifest:
        """Parse and validate. `where` names the artifact in errors. Raises `InvalidManifest` or `NewerManifest`."""
        if len(data) > MANIFEST_LIMIT_BYTES:
            raise InvalidManifest(f"{where}: {MANIFEST} has more than {MANIFEST_LIMIT_BYTES:,} bytes")
        try:
            raw = from_json(data)
        except ValueError as error:
            raise InvalidManifest(f"{where}: {MANIFEST} is not JSON: {error}") from None
        found = raw.get("format") if isinstance(raw, dict) else None
        if isinstance(found, int) and found > FORMAT:
            raise NewerManifest(
                f"{where}: the manifest has format {found}, this actserve reads up to {FORMAT}; upgrade actserve",
                expected=FORMAT,
                got=found,
            )
        try:
            manifest = _adapter().validate_python(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            spot = ".".join(map(str, first["loc"])) or "the whole"
            raise InvalidManifest(f"{where}: {MANIFEST}: {spot[:200]}: {first['msg']}") from None
        if reserved := {MANIFEST, SIGNATURE} & manifest.files.keys():
            raise InvalidManifest(f"{where}: {MANIFEST}: {reserved.pop()} cannot be one of files")
        for runtime, program in manifest.programs.items():
            if program.file not in manifest.files:
                raise InvalidManifest(f"{where}: {MANIFEST}: the {runtime} program {program.file!r} is not in files")
        return manifest


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


@dataclass(frozen=True)
class Artifact:
    """One version folder, opened: its manifest was read; its files are hashed each time they are read."""

    folder: Path
    manifest: Manifest
    signer: str | None = None  # the fingerprint of the trusted key that signed the manifest
    fetched: bool = False  # the folder is a copy of what came from a remote store

    @property
    def label(self) -> str:
        return f"{self.manifest.name}@{self.manifest.version}"

    @staticmethod
    def open(folder: Path, label: str, trust: Trust | None = None, fetched: bool = False) -> Artifact:
        """Read the manifest and look over the folder (names and sizes, not contents). Raises a `StoreError`."""
        try:
            data = read_plain(folder / MANIFEST, MANIFEST_LIMIT_BYTES + 1)
        except FileNotFoundError:
            raise UnfinishedVersion(f"{label}: there is no {MANIFEST}: publishing it was cut short") from None
        except OSError as error:
            raise InvalidManifest(f"{label}: {MANIFEST} cannot be read: {error.strerror}") from None
        try:
            signature = read_plain(folder / SIGNATURE, SIGNATURE_LIMIT_BYTES + 1)
        except OSError:
            signature = None
        signer = (trust or Trust()).signer(label, data, signature)
        artifact = Artifact(folder, Manifest.from_json(data, label), signer, fetched)
        artifact._look_over()
        return artifact

    def _look_over(self) -> None:
        try:
            sizes = {
                entry.name: entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else None
                for entry in os.scandir(self.folder)
            }
        except OSError as error:
            raise MissingFile(f"{self.label}: its folder cannot be read: {error.strerror}") from None
        for name in (MANIFEST, SIGNATURE):
            sizes.pop(name, None)
        listed = self.manifest.files
        served = {GOLDEN, *(program.file for program in self.manifest.programs.values())}
        for name in listed.keys() & served - sizes.keys():  # others can be left out where nothing is built from them
            raise MissingFile(f"{self.label}: {name} is in the manifest and not in the folder", file=name)
        for name in sizes.keys() - listed.keys():
            raise UnexpectedFile(f"{self.label}: {name} is in the folder and not in the manifest", file=name)
        for name, size in sizes.items():
            if size is None:
                raise UnexpectedFile(f"{self.label}: {name} is not a plain file", file=name)
            self._check_size(name, size)

    def _check_size(self, name: str, size: int) -> None:
        expected = self.manifest.files[name].bytes
        if size != expected:
            raise CorruptFile(
                f"{self.label}: {name} has {size:,} bytes, the manifest says {expected:,}",
                file=name,
                expected_bytes=expected,
                got_bytes=size,
            )

    def read(self, name: str) -> bytes:
        """The bytes of one file, verified: what was hashed is what is returned. Raises a `StoreError`."""
        record = self.manifest.files.get(name)
        if record is None:
            raise MissingFile(f"{self.label}: there is no {name} in its manifest", file=name)
        try:
            data = read_plain(self.folder / name, record.bytes + 1)
        except OSError as error:
            raise MissingFile(f"{self.label}: {name} cannot be read: {error.strerror}", file=name) from None
        self._check_size(name, len(data))
        digest = hashlib.sha256(data).hexdigest()
        if digest != record.sha256:
            raise CorruptFile(
                f"{self.label}: {name} is not what was published: its SHA-256 is {digest[:12]}…, "
                f"the manifest says {record.sha256[:12]}…",
                file=name,
            )
        return data

    def read_program(self, runtime: str) -> bytes:
        """A program's bytes, to be opened. Raises a `StoreError`, or `UntrustedProgram` for native code of others."""
        self.check_trust(runtime)
        return self.read(self.manifest.programs[runtime].file)

    def check_trust(self, runtime: str) -> None:
        """Raises `UntrustedProgram` for native code that somebody else than this user could have put here, unsigned."""
        if runtime in NATIVE and self.signer is None and (reason := self._distrust(runtime)) is not None:
            raise UntrustedProgram(f"{self.label}: .{runtime} is native code, no trusted key signed it, and {reason}")

    def _distrust(self, runtime: str) -> str | None:
        """Why a program could be somebody else's, or None."""
        if self.fetched:
            return "it came from a remote store"
        file = self.manifest.programs[runtime].file
        try:
            return meddler(self.folder / MANIFEST) or meddler(self.folder / file)
        except OSError as error:
            raise MissingFile(f"{self.label}: {file} cannot be read: {error.strerror}", file=file) from None


def read_plain(path: Path, limit_bytes: int) -> bytes:
    """At most `limit_bytes` of a plain file. Raises OSError, also for links and for what would never end."""
    # Not blocking: opening a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        return file.read(limit_bytes)
