"""Manifest and Artifact: one immutable version of one policy, and the record that describes it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from actserve.core.environment import Contract
from actserve.core.errors import (
    CorruptFile,
    InvalidManifest,
    MissingFile,
    NewerManifest,
    StoreError,
    UnexpectedFile,
    UnfinishedVersion,
    UntrustedProgram,
)
from actserve.core.signature import Signature
from actserve.store.trust import Trust
from actserve.store.trust.ownership import untrusted_reason

FORMAT = 2  # of the manifest; newer formats are refused
WITHOUT_LIMITS = 1  # the format of a manifest whose signature has no limits: older versions of actserve read it
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"  # 64 bytes, signs the manifest's bytes; optional
GOLDEN = "golden.safetensors"
NATIVE = ("pt2",)  # runtimes whose programs are machine code: loading one executes it
MANIFEST_LIMIT_BYTES = 4 << 20
SIGNATURE_LIMIT_BYTES = 64
FILE_LIMIT_BYTES = 4 << 30  # files are read into memory
FILES_LIMIT = 64
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


@dataclass(frozen=True)
class FileRecord:
    """Hash (SHA-256, hexadecimal) and size of one file of an artifact."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, le=FILE_LIMIT_BYTES)]


Files = Annotated[dict[Annotated[str, Field(pattern=FILE_NAME)], FileRecord], Field(max_length=FILES_LIMIT)]


@dataclass(frozen=True)
class Program:
    """One program file and its requirements on the host."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    file: str
    requires: dict[str, Any] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()  # rewrites of the captured graph before the build


@dataclass(frozen=True)
class Manifest:
    """The store's record of one artifact. Written once, never changed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    name: str
    version: int
    parent: int | None  # the version that this one was compiled from, for another host
    created: str  # ISO 8601, UTC
    signature: Signature
    environment: Contract | None
    programs: dict[str, Program]  # by runtime name
    files: Files  # all files in the folder except the manifest and its signature
    provenance: dict[str, Any]  # its origin: factory, checkpoint, fingerprint, versions
    certificate: dict[str, Any]  # the evidence that the programs act as the policy does

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`, which the signature covers."""
        return json.dumps(self.to_dict(), indent=1).encode() + b"\n"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        dumped: dict[str, Any] = _adapter().dump_python(self, mode="json")
        if self.signature.limits is None:
            del dumped["signature"]["limits"]
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
    """One version folder. `open` reads the manifest; every `read` of a file verifies its hash."""

    folder: Path
    manifest: Manifest
    signer: str | None = None  # the fingerprint of the trusted key that signed the manifest
    fetched: bool = False  # the folder was downloaded from a remote store

    @property
    def label(self) -> str:
        return f"{self.manifest.name}@{self.manifest.version}"

    @staticmethod
    def open(folder: Path, label: str, trust: Trust | None = None, fetched: bool = False) -> Artifact:
        """Read the manifest and check names and sizes of the files, but not their contents. Raises a `StoreError`."""
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
        artifact._check_folder()
        return artifact

    def _check_folder(self) -> None:
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
        required = {GOLDEN, *(program.file for program in self.manifest.programs.values())}
        for name in listed.keys() & required - sizes.keys():  # other files are only needed to compile programs
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
        """The verified bytes of one file: the returned bytes are the ones that were hashed. Raises a `StoreError`."""
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
        """A program's verified bytes. Raises a `StoreError`, or `UntrustedProgram` for untrusted native code."""
        self.check_trust(runtime)
        return self.read(self.manifest.programs[runtime].file)

    def beside(self, kind: str) -> Path:
        """A file next to the artifact's folder, with findings of this host. The folder itself never changes."""
        return self.folder.with_name(f"{self.manifest.version}.{kind}.json")

    def write_beside(self, kind: str, document: Any) -> Path:
        """Write such a file atomically, as JSON. Raises `StoreError`."""
        file = self.beside(kind)
        staging = file.with_suffix(f".{os.getpid()}")
        try:
            staging.write_text(json.dumps(document, indent=1) + "\n")
            staging.replace(file)
        except OSError as error:
            with suppress(OSError):
                staging.unlink()
            raise StoreError(f"{file.name} cannot be written beside {self.label}: {error.strerror}") from None
        return file

    def check_trust(self, runtime: str) -> None:
        """Raises `UntrustedProgram` for unsigned native code that another user could have written."""
        if runtime in NATIVE and self.signer is None and (reason := self._untrusted_reason(runtime)) is not None:
            raise UntrustedProgram(f"{self.label}: .{runtime} is native code, no trusted key signed it, and {reason}")

    def _untrusted_reason(self, runtime: str) -> str | None:
        """Why another user could have written a program, or None."""
        if self.fetched:
            return "it came from a remote store"
        file = self.manifest.programs[runtime].file
        try:
            return untrusted_reason(self.folder / MANIFEST) or untrusted_reason(self.folder / file)
        except OSError as error:
            raise MissingFile(f"{self.label}: {file} cannot be read: {error.strerror}", file=file) from None


def read_plain(path: Path, limit_bytes: int) -> bytes:
    """At most `limit_bytes` of a plain file. Raises OSError, also for links, pipes and devices."""
    # O_NONBLOCK: opening a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        return file.read(limit_bytes)
